"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from bigdssm.training.validation import WeightAverage


def module(value: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(value)
    return layer


def test_an_average_follows_the_weights_by_its_decay() -> None:
    layer = module(1.0)
    average, expected = WeightAverage(layer, 0.5), 1.0
    for step in range(12):
        with torch.no_grad():
            for weight in layer.parameters():
                weight.fill_(float(step))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.swapped_in():
        for weight in layer.parameters():
            torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected))
    assert all((weight == 11.0).all() for weight in layer.parameters())


def test_the_weights_are_back_after_an_error() -> None:
    layer = module(2.0)
    average = WeightAverage(module(5.0), 0.9)
    average._module = layer
    with pytest.raises(RuntimeError), average.swapped_in():
        assert (layer.weight == 5.0).all()
        raise RuntimeError
    assert (layer.weight == 2.0).all()


def test_an_average_resumes_and_restarts_for_a_grown_module() -> None:
    layer = module(1.0)
    average = WeightAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    average.update()
    state = average.state_dict()
    again = WeightAverage(module(7.0), 0.9)
    again.load_state_dict(state)
    assert again.num_updates == 1 and torch.equal(again.state_dict()["average.weight"], state["average.weight"])
    grown = torch.nn.Linear(4, 2)
    anew = WeightAverage(grown, 0.9)
    anew.load_state_dict(state)
    assert anew.num_updates == 0 and torch.equal(anew.state_dict()["average.weight"], grown.weight)
