"""What test_gpu.py runs under torchrun: a run with FSDP2, and the same run resumed from its middle.

`torchrun sharded_run.py OUTPUT_DIR` writes the logs of both to OUTPUT_DIR/logs.json.
"""

import json
import os
import sys

from tiny_training import Sequences, arguments, gpt2, training_logs

from hf_alsals import AlsalsTrainer

if __name__ == "__main__":
    output_dir = sys.argv[1]
    fsdp = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}}
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "use_cpu": False}
    logs = []
    for checkpoint in (None, os.path.join(output_dir, "checkpoint-5")):
        trainer = AlsalsTrainer(gpt2(dropout=0), arguments(output_dir, **fsdp, **saving), train_dataset=Sequences())
        trainer.train(resume_from_checkpoint=checkpoint)
        logs.append(training_logs(trainer))
    if trainer.is_world_process_zero():
        with open(os.path.join(output_dir, "logs.json"), "w") as file:
            json.dump(logs, file)
