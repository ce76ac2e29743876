from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import pytest
import torch

from hf_alsals.plain_state import MOST_VALUES, PlainState, plain_values


def test_numbers_and_texts_come_back_and_new_attributes_go():
    owner = SimpleNamespace(count=1, ratio=0.5, name="a", flag=True, nothing=None, gone=3)
    before = PlainState(owner)
    owner.count, owner.ratio, owner.name, owner.flag, owner.nothing = 2, 0.7, "b", False, [1]
    owner.new = 5
    del owner.gone
    before.restore()
    assert vars(owner) == {"count": 1, "ratio": 0.5, "name": "a", "flag": True, "nothing": None, "gone": 3}


def metrics():
    factory = defaultdict(lambda: defaultdict(list))  # as ORPO's, which no copy or pickle can take
    factory["train"]["loss"] += [1.0, 2.0]
    return factory


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1, 2], lambda value: value.append(3)),
        ([1, [2, 3]], lambda value: value[1].clear()),
        ({"a": {"b": [1]}}, lambda value: value["a"]["b"].append(2)),
        ({"a": 1, "b": 2}, lambda value: value.update(a=value.pop("b"))),
        (deque([1, 2], maxlen=2), lambda value: value.append(3)),
        ({1, 2}, lambda value: value.add(3)),
        (OrderedDict(a=1, b=2), lambda value: value.move_to_end("a")),
        (Counter("aab"), lambda value: value.update("abc")),
        (metrics(), lambda value: value["train"]["loss"].append(3.0)),
        (metrics(), lambda value: value["eval"]["loss"].append(3.0)),
        (metrics(), lambda value: value.pop("train")),
    ],
)
def test_containers_come_back_in_place(value, change):
    def shown(value):
        return [shown(item) for item in value.items()] if isinstance(value, dict) else repr(value)

    owner = SimpleNamespace(value=value)
    alias, expected = value, shown(value)
    before = PlainState(owner)
    change(value)
    assert shown(value) != expected
    before.restore()
    assert owner.value is alias
    assert shown(alias) == expected
    if isinstance(value, defaultdict):
        assert value["eval"]["loss"] == []
    if isinstance(value, deque):
        assert value.maxlen == 2


def test_a_container_that_was_replaced_is_bound_again():
    owner = SimpleNamespace(metrics={"train": [1.0]})
    kept = owner.metrics
    before = PlainState(owner)
    owner.metrics["train"].append(2.0)
    owner.metrics = {}
    before.restore()
    assert owner.metrics is kept
    assert kept == {"train": [1.0]}


def test_what_did_not_move_is_not_touched():
    class Watched(list):
        def clear(self):
            raise AssertionError("written to")

    owner = SimpleNamespace(watched=Watched([1, {"a": [2]}, float("nan")]))
    PlainState(owner).restore()
    assert owner.watched[:2] == [1, {"a": [2]}]


def test_one_element_tensors_come_back_in_place():
    owner = SimpleNamespace(steps=torch.tensor(3), sums={"loss": torch.tensor([1.5])}, weight=torch.zeros(2))
    steps, loss = owner.steps, owner.sums["loss"]
    before = PlainState(owner)
    steps += 1
    owner.sums["loss"] *= 0
    owner.sums["other"] = torch.tensor(1.0)
    before.restore()
    assert owner.steps is steps and steps.item() == 3
    assert owner.sums == {"loss": loss} and loss.item() == 1.5


def test_the_inside_of_other_objects_and_of_larger_tensors_stays():
    owner = SimpleNamespace(weight=torch.zeros(2), part=SimpleNamespace(count=1), pair=([1], 2))
    values = vars(owner).copy()
    before = PlainState(owner)
    owner.weight += 1
    owner.part.count = 2
    owner.pair[0].append(2)
    owner.weight, owner.part, owner.pair = None, None, None
    before.restore()
    assert all(vars(owner)[name] is value for name, value in values.items())
    assert owner.weight.tolist() == [1, 1]
    assert owner.part.count == 2
    assert owner.pair == ([1, 2], 2)


def test_a_big_list_is_left_alone_but_cut_back_to_its_length():
    owner = SimpleNamespace(data=[[i] for i in range(MOST_VALUES)], counts=dict.fromkeys(range(MOST_VALUES), 0))
    before = PlainState(owner)
    owner.data[0].append(1)
    owner.data.append([1])
    owner.counts[0] = 1
    before.restore()
    assert len(owner.data) == MOST_VALUES
    assert owner.data[0] == [0, 1]
    assert owner.counts[0] == 1


def test_a_container_in_itself():
    values = [1]
    values.append(values)
    owner = SimpleNamespace(values=values, again=values)
    before = PlainState(owner)
    values.append(3)
    before.restore()
    assert len(values) == 2 and values[1] is values and owner.again is values


def test_plain_values():
    owner = SimpleNamespace(count=1, ratio=0.5, name="a", flag=True, nothing=None, values=[1], tensor=torch.ones(()))
    assert plain_values(owner) == {"count": 1, "ratio": 0.5, "name": "a", "flag": True, "nothing": None}
