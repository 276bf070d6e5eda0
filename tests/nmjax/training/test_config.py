import json

import pytest

from nmjax.training import TrainConfig

REQUIRED = {"epochs": 3, "batch_size": 8, "lr": 0.1, "weight_decay": 1e-4}


def test_a_config_survives_json():
    config = TrainConfig(**REQUIRED, step_epochs=(1, 2), schedule="step", clip_norm=1.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(TrainConfig(**REQUIRED, step_epochs=[1, 2])) == hash(
        TrainConfig(**REQUIRED, step_epochs=(1, 2))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected an integer >= 1"),
        ({"epochs": 1.5}, "epochs is 1.5, expected an integer >= 1"),
        ({"epochs": True}, "epochs is True"),
        ({"batch_size": -8}, "batch_size is -8, expected an integer >= 1"),
        ({"micro_batches": 3}, "batch_size 8 is not a multiple of micro_batches 3"),
        ({"optimizer": "adam"}, "optimizer is 'adam', expected one of sgd, adamw"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of cosine, step"),
        ({"lr": 0}, "lr is 0, expected a number > 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001, expected a number >= 0"),
        ({"momentum": 1}, "momentum is 1, expected a number >= 0 and < 1"),
        ({"label_smoothing": 1}, "label_smoothing is 1"),
        ({"warmup_epochs": 3}, "warmup_epochs is 3, expected a number >= 0 and < 3"),
        ({"step_epochs": (2, 1)}, "step_epochs is"),
        ({"step_epochs": (0, 1)}, "step_epochs is"),
        ({"step_factor": 0}, "step_factor is 0, expected a number > 0 and <= 1"),
        ({"clip_norm": 0}, "clip_norm is 0, expected a number > 0"),
        ({"loss_scale": 0}, "loss_scale is 0, expected a number > 0"),
        ({"seed": -1}, "seed is -1, expected an integer >= 0"),
        ({"seed": 2**31}, "seed is 2147483648, expected an integer <= 2147483647"),
        ({"keep": 0}, "keep is 0, expected an integer >= 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"nesterov": 1}, "nesterov is 1, expected true or false"),
        ({"nesterov": True, "momentum": 0}, "nesterov needs a momentum above 0"),
        ({"optimizer": "adamw", "momentum": 0.8}, "act on optimizer 'sgd' only"),
        ({"dense_epochs": 3}, "leave a phase in which the network is sparse"),
        ({"dense_epochs": 2, "freeze_epochs": 2}, "must fit into epochs 3"),
    ],
)
def test_a_wrong_value_is_refused_with_its_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**REQUIRED, **changes})


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ValueError, match="unknown fields learning_rate; known are"):
        TrainConfig.from_dict({**REQUIRED, "learning_rate": 1})
    with pytest.raises(ValueError, match="missing fields batch_size, lr"):
        TrainConfig.from_dict({"epochs": 1, "weight_decay": 0})
