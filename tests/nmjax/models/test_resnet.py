import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from nmjax import models
from nmjax.models.resnet import BasicBlock, Bottleneck, ResNet

EPSILON = 1e-5


def shapes_of(model, image_shape=(1, 32, 32, 3)):
    """Flat `collection/path -> shape`, without computing anything."""
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {
        path: leaf.shape
        for path, leaf in traverse_util.flatten_dict(variables, sep="/").items()
    }


def count_parameters(model):
    shapes = shapes_of(model)
    return sum(int(np.prod(shapes[p])) for p in shapes if p.startswith("params/"))


def layers_of(model):
    """`layer path -> module` of every layer, without computing anything."""
    layers = {}

    def record(next_fun, args, kwargs, context):
        layers["/".join(context.module.path)] = context.module
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(model)
    return layers


# The definition, in NumPy and float64: a convolution is a sum over kernel positions.


def np_conv(x, kernel, stride, pad):
    height, width = kernel.shape[:2]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = (x.shape[1] - height) // stride + 1
    columns = (x.shape[2] - width) // stride + 1
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            window = x[:, i : i + stride * rows : stride]
            window = window[:, :, j : j + stride * columns : stride]
            y += window[:, :rows, :columns] @ kernel[i, j]
    return y


def np_max_pool(x):  # 3x3, stride 2, padding 1
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    return np.max(
        [
            x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2][:, :rows, :columns]
            for i in range(3)
            for j in range(3)
        ],
        axis=0,
    )


class NumPyResNet:
    """The same network from the same variables, with nothing of Flax."""

    def __init__(self, variables, train):
        flat = traverse_util.flatten_dict(variables, sep="/")
        self.values = {k: np.asarray(v, np.float64) for k, v in flat.items()}
        self.train = train
        self.new_stats = {}

    def conv(self, x, path, stride=1):
        kernel = self.values[f"params/{path}/kernel"]
        return np_conv(x, kernel, stride, pad=kernel.shape[0] // 2)

    def norm(self, x, path):
        mean = self.values[f"batch_stats/{path}/mean"]
        var = self.values[f"batch_stats/{path}/var"]
        if self.train:
            batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.new_stats[f"{path}/mean"] = 0.9 * mean + 0.1 * batch_mean
            self.new_stats[f"{path}/var"] = 0.9 * var + 0.1 * batch_var
            mean, var = batch_mean, batch_var
        scale = self.values[f"params/{path}/scale"]
        bias = self.values[f"params/{path}/bias"]
        return (x - mean) / np.sqrt(var + EPSILON) * scale + bias

    def block(self, x, path, strides):
        """`strides[i]` is the stride of `conv{i + 1}`."""
        y = x
        for i, stride in enumerate(strides, start=1):
            y = self.norm(self.conv(y, f"{path}/conv{i}", stride), f"{path}/norm{i}")
            if i < len(strides):
                y = np.maximum(y, 0)
        if f"params/{path}/downsample/kernel" in self.values:
            x = self.conv(x, f"{path}/downsample", max(strides))
            x = self.norm(x, f"{path}/downsample_norm")
        return np.maximum(x + y, 0)

    def __call__(self, x, blocks, stem):
        x = self.conv(x, "stem", stride=2 if stem == "imagenet" else 1)
        x = np.maximum(self.norm(x, "stem_norm"), 0)
        if stem == "imagenet":
            x = np_max_pool(x)
        for path, strides in blocks.items():
            x = self.block(x, path, strides)
        kernel = self.values["params/head/kernel"]
        return x.mean((1, 2)) @ kernel + self.values["params/head/bias"]


def random_variables(model, images, seed=0):
    """Variables of `model`, drawn so that no norm or statistic is the identity."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif path[-1].key in ("bias", "mean"):
            value = rng.normal(0, 0.3, leaf.shape)
        else:
            value = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


CASES = {
    "basic": (
        ResNet((1, 2), BasicBlock, num_classes=5, width=4),
        {"stage1_block1": (1, 1), "stage2_block1": (2, 1), "stage2_block2": (1, 1)},
    ),
    "bottleneck": (
        ResNet((1, 2), Bottleneck, num_classes=5, width=4),
        {
            "stage1_block1": (1, 1, 1),
            "stage2_block1": (1, 2, 1),
            "stage2_block2": (1, 1, 1),
        },
    ),
    "resnet8": (
        models.ResNet8(num_classes=5, width=4),
        {"stage1_block1": (1, 1), "stage2_block1": (2, 1), "stage3_block1": (2, 1)},
    ),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_definition(case, train):
    model, blocks = CASES[case]
    rng = np.random.default_rng(1)
    # An even and an odd side: SAME padding would differ from torchvision's on the even.
    images = rng.normal(size=(3, 18, 21, 3)).astype(np.float32)
    variables = random_variables(model, images)

    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    logits, updated = apply(variables, images, train=train, mutable=("batch_stats",))
    reference = NumPyResNet(variables, train)
    expected = reference(images.astype(np.float64), blocks, model.stem)

    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    stats = traverse_util.flatten_dict(updated["batch_stats"], sep="/")
    if train:
        assert stats.keys() == reference.new_stats.keys()
        for path, value in stats.items():
            np.testing.assert_allclose(
                value, reference.new_stats[path], rtol=1e-4, atol=1e-5, err_msg=path
            )
    else:
        before = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
        for path, value in stats.items():
            np.testing.assert_array_equal(value, before[path], err_msg=path)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        pytest.param("resnet101", 44_549_160, marks=pytest.mark.slow),
        pytest.param("resnet152", 60_192_808, marks=pytest.mark.slow),
    ],
)
def test_parameter_count_is_torchvisions(name, parameters):
    assert count_parameters(models.create(name)) == parameters


def test_resnet8_has_78k_parameters():
    assert count_parameters(models.create("resnet8", num_classes=10)) == 78_042


def test_layer_paths_stay():
    def layers(model):
        return {
            path.split("/", 1)[1].rsplit("/", 1)[0]
            for path in shapes_of(model)
            if path.startswith("params/")
        }

    def block(name, convs, downsample):
        names = [f"{kind}{i}" for i in range(1, convs + 1) for kind in ("conv", "norm")]
        names += ["downsample", "downsample_norm"] if downsample else []
        return {f"{name}/{n}" for n in names}

    ends = {"stem", "stem_norm", "head"}
    assert layers(models.ResNet8()) == ends.union(
        block("stage1_block1", 2, downsample=False),
        block("stage2_block1", 2, downsample=True),
        block("stage3_block1", 2, downsample=True),
    )
    assert layers(models.ResNet18()) == ends.union(
        *(
            block(f"stage{s}_block{b}", 2, downsample=s > 1 and b == 1)
            for s in (1, 2, 3, 4)
            for b in (1, 2)
        )
    )
    assert layers(models.ResNet50()) == ends.union(
        *(
            block(f"stage{s}_block{b}", 3, downsample=b == 1)
            for s, blocks in enumerate((3, 4, 6, 3), start=1)
            for b in range(1, blocks + 1)
        )
    )


@pytest.mark.parametrize(
    "stem, stages", [("imagenet", [56, 28, 14, 7]), ("small", [224, 112, 56, 28])]
)
@pytest.mark.parametrize("name, expansion", [("resnet18", 1), ("resnet50", 4)])
def test_feature_maps(name, expansion, stem, stages):
    model = models.create(name, stem=stem)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    is_block = lambda module, _: isinstance(module, BasicBlock | Bottleneck)  # noqa: E731
    _, captured = jax.eval_shape(
        lambda images: model.init_with_output(
            jax.random.key(0), images, capture_intermediates=is_block
        ),
        images,
    )
    shapes = {k: v["__call__"][0].shape for k, v in captured["intermediates"].items()}
    for s, side in enumerate(stages):
        width = 64 * 2**s * expansion
        assert shapes[f"stage{s + 1}_block2"] == (2, side, side, width)


def test_gradients_reach_every_parameter():
    model = ResNet((1,), Bottleneck, num_classes=5, width=4)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    variables = random_variables(model, images)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(logits**2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.all(np.isfinite(grad)) and np.any(grad), path


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    model = models.create("resnet8", num_classes=5, width=4)
    half = models.create("resnet8", num_classes=5, width=4, dtype=jnp.bfloat16)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    variables = random_variables(half, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def apply(model):
        return model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )

    logits, updated = jax.jit(lambda: apply(half))()
    block = updated["intermediates"]["stage2_block1"]
    assert block["conv1"]["__call__"][0].dtype == jnp.bfloat16
    assert block["norm1"]["__call__"][0].dtype == jnp.bfloat16
    assert block["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    stats = jax.tree.leaves(updated["batch_stats"])
    assert {leaf.dtype for leaf in stats} == {jnp.dtype("float32")}

    full, _ = jax.jit(lambda: apply(model))()
    np.testing.assert_allclose(logits, full, atol=0.1 * np.abs(full).max())


def test_convolutions_start_from_he_normal_over_the_fan_out():
    layers = layers_of(models.ResNet8()).values()
    (init,) = {layer.kernel_init for layer in layers if isinstance(layer, nn.Conv)}
    kernel = init(jax.random.key(0), (3, 3, 512, 128), jnp.float32)  # 590k draws
    kernel = np.asarray(kernel) / np.sqrt(2 / (3 * 3 * 128))
    assert kernel.std() == pytest.approx(1, rel=0.01)
    # A normal, not a truncated one: 0.27% of the draws lie beyond three deviations.
    assert np.mean(np.abs(kernel) > 3) == pytest.approx(0.0027, rel=0.2)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name, last", [("resnet18", "norm2"), ("resnet50", "norm3")])
def test_zero_init_residual_starts_the_last_norm_of_each_block_at_zero(
    name, last, zero
):
    layers = layers_of(models.create(name, zero_init_residual=zero))
    norms = {k: v for k, v in layers.items() if isinstance(v, nn.BatchNorm)}
    starts = {k: float(v.scale_init(None, (), jnp.float32)) for k, v in norms.items()}
    assert starts == {k: 0 if zero and k.endswith("/" + last) else 1 for k in norms}


def test_convolution_and_norm_classes_are_arguments():
    class MarkedConv(nn.Conv):
        pass

    model = models.ResNet8(
        num_classes=5,
        width=4,
        conv=MarkedConv,
        norm=functools.partial(nn.BatchNorm, axis_name="batch"),
    )
    convs = [v for v in layers_of(model).values() if isinstance(v, nn.Conv)]
    assert len(convs) == 9 and {type(conv) for conv in convs} == {MarkedConv}

    # Statistics over the mapped axis are those of the whole batch.
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 3)).astype(np.float32)
    variables = random_variables(model, images[0])

    def apply(model, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    split = jax.vmap(functools.partial(apply, model), axis_name="batch")
    whole = functools.partial(apply, models.ResNet8(num_classes=5, width=4))
    np.testing.assert_allclose(
        jax.jit(split)(images).reshape(6, 5),
        jax.jit(whole)(images.reshape(6, 8, 8, 3)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_equal_models_share_a_trace():
    traces = 0

    @functools.partial(jax.jit, static_argnums=0)
    def initialise(model):
        nonlocal traces
        traces += 1
        return model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))

    initialise.trace(models.create("resnet8", num_classes=5))
    initialise.trace(models.create("resnet8", num_classes=5))
    assert traces == 1


def test_create_makes_what_it_is_asked_for():
    model = models.create("resnet50", num_classes=7, stem="small", width=8)
    assert model == models.ResNet50(num_classes=7, stem="small", width=8)
    assert models.create("resnet8").stem == "small"
    assert models.create("resnet18").stem == "imagenet"


def test_an_unknown_name_or_stem_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'resnet9' is none of: resnet8, resnet18"):
        models.create("resnet9")
    with pytest.raises(ValueError, match="stem 'cifar' is none of: imagenet, small"):
        models.create("resnet8", stem="cifar")
