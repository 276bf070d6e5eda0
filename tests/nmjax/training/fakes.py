"""A tiny data set and model, for the tests of the trainer and their subprocesses."""

import zlib

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import nmjax
from nmjax.training import TrainConfig

RULES = [
    nmjax.Rule("stem|head", None),
    nmjax.Rule(".*", nmjax.recipes.sr_ste("2:4", decay=1e-2)),
]


def config(**changes) -> TrainConfig:
    """Four epochs of four steps; runs that share it share a compilation."""
    fields = {
        "epochs": 4,
        "batch_size": 16,
        "lr": 0.05,
        "weight_decay": 1e-3,
        "log_every": 3,
        **changes,
    }
    return TrainConfig(**fields)


class FakeBatches:
    """What Grain's iterator does, in NumPy; `at_step` is called before each batch."""

    def __init__(self, data, batch_size, seed):
        self.data, self.batch_size, self.seed, self.next = data, batch_size, seed, 0

    def __next__(self):
        if self.data.at_step is not None:
            self.data.at_step(self.next)
        size, images = self.batch_size, self.data.num_train
        epoch, batch = divmod(self.next, images // size)
        order = np.random.default_rng((self.seed, epoch)).permutation(images)
        taken = order[batch * size : (batch + 1) * size]
        self.next += 1
        self.data.served.append(taken.tolist())
        return {"image": self.data.images[taken], "label": self.data.labels[taken]}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


class FakeData:
    """64 noisy copies of one random image for each class; 20 more to test."""

    name = "fake"
    stem = "small"
    image_shape = (4, 4, 4)
    num_train = 64
    num_test = 20

    def __init__(self, num_classes=10, at_step=None):
        rng = np.random.default_rng(0)
        self.num_classes, self.at_step, self.served = num_classes, at_step, []
        centres = rng.normal(size=(num_classes, *self.image_shape))
        self.labels = rng.integers(0, num_classes, 64).astype(np.int32)
        self.test_labels = rng.integers(0, num_classes, 20).astype(np.int32)
        noise = rng.normal(size=(84, *self.image_shape)) / 2
        self.images = (centres[self.labels] + noise[:64]).astype(np.float32)
        self.test_images = (centres[self.test_labels] + noise[64:]).astype(np.float32)

    def train_batches(self, batch_size, *, seed, num_hosts=1, host=0):
        return FakeBatches(self, batch_size, seed)

    def test_batches(self, batch_size, *, num_hosts=1, host=0):
        for start in range(0, self.num_test, batch_size):
            labels = self.test_labels[start : start + batch_size]
            padding = batch_size - len(labels)
            images = self.test_images[start : start + batch_size]
            yield {
                # Padded with NaN: nothing of it may reach a metric.
                "image": np.concatenate(
                    [images, np.full((padding, *self.image_shape), np.nan, np.float32)]
                ),
                "label": np.pad(labels, (0, padding)),
                "valid": np.pad(np.ones(len(labels), np.float32), (0, padding)),
            }


def numpy_init(key, shape, dtype=jnp.float32):
    """He's normal distribution, without the seconds that jax.random compiles for."""
    rng = np.random.default_rng(zlib.crc32(repr(shape).encode()))
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), dtype)


class Net(nn.Module):
    """Two convolutions, of which one may be sparse, batch norm, two dense layers."""

    num_classes: int = 10
    width: int = 8
    batch_norm: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (1, 1), kernel_init=numpy_init, name="stem")(x)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x)
        x = nn.Conv(8, (3, 3), strides=2, kernel_init=numpy_init, name="conv")(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(16, kernel_init=numpy_init, name="fc")(x))
        return nn.Dense(self.num_classes, kernel_init=numpy_init, name="head")(x)


class Crash(Exception):
    pass


def crash_at(step):
    """For `FakeData`: a crash where the batch of this step is asked for."""

    def at_step(number):
        if number == step:
            raise Crash

    return at_step
