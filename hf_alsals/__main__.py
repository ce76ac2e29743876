"""`python -m hf_alsals` is `hf-alsals`, for torchrun and accelerate launch."""

from .cli import main

if __name__ == "__main__":
    main()
