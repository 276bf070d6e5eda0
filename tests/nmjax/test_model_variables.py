"""Linen models that read, transform or pass on variables themselves."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax

KEY = jax.random.key(0)
X = jnp.ones((4, 16))


# A sparse model within another model's method, and methods of its own


def student_of(teacher, variables):
    class Student(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x), teacher.apply(variables, x)

    return Student()


def test_a_sparse_teacher_does_not_rename_its_student():
    teacher = nn.Dense(8)
    variables = teacher.init(jax.random.key(5), X)
    sparse = nmjax.sparsify(teacher, "2:4")
    student = student_of(sparse, variables)
    params = student.init(KEY, X)
    expected = student_of(teacher, variables).init(KEY, X)
    assert list(params["params"]) == list(expected["params"]) == ["Dense_0"]
    _, taught = student.apply(params, X)
    np.testing.assert_array_equal(taught, sparse.apply(variables, X))


def test_a_sparse_teacher_within_setup():
    teacher = nn.Dense(8)
    variables = teacher.init(jax.random.key(5), X)
    sparse = nmjax.sparsify(teacher, "2:4")

    class Student(nn.Module):
        def setup(self):
            self.layer = nn.Dense(8)

        def __call__(self, x):
            return self.layer(x), sparse.apply(variables, x)

    student = Student()
    _, taught = student.apply(student.init(KEY, X), X)
    np.testing.assert_array_equal(taught, sparse.apply(variables, X))


class Helped(nn.Module):
    """With methods that start from the outside."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)

    def start(self, key):
        return self.init(key, X)

    def loss(self, variables, x):
        return self.apply(variables, x).sum()

    def table(self):
        return self.tabulate(KEY, X)


def test_methods_that_call_init_and_apply():
    model = nmjax.sparsify(Helped(), "2:4")
    variables = model.start(KEY)
    jax.tree.map(np.testing.assert_array_equal, variables, Helped().init(KEY, X))
    assert model.loss(variables, X) == model.apply(variables, X).sum()
    assert "Dense_0" in model.table()


def test_a_layer_made_sparse_within_a_model_is_refused():
    class Maker(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nmjax.sparsify(nn.Dense(8), "2:4")(x)

    with pytest.raises(ValueError, match="cannot be part of another model"):
        Maker().init(KEY, X)


# Parameters that no layer asks for


class Experts(nn.Module):
    """Their parameters are one tree of arrays."""

    @nn.compact
    def __call__(self, x):
        expert = nn.Dense(16, parent=None)

        def init(key):
            return jax.vmap(lambda k: expert.init(k, x)["params"])(
                jax.random.split(key, 3)
            )

        stacked = self.param("experts", init)
        y = jax.vmap(lambda params: expert.apply({"params": params}, x))(stacked)
        return nn.Dense(8, name="head")(y.mean(0))


def test_parameters_that_are_a_tree_are_not_dense_in_silence():
    rules = [nmjax.Rule("head", None), nmjax.Rule(".*", "2:4")]
    variables = Experts().init(KEY, X)
    for refused in (
        lambda: nmjax.plan(Experts(), rules, X),
        lambda: nmjax.sparsify(Experts(), rules).init(KEY, X),
        lambda: nmjax.sparsify(Experts(), rules).apply(variables, X),
    ):
        message = r"experts/kernel \(3, 16, 16\): no hook: the model reads this"
        with pytest.raises(nmjax.PlanError, match=message):
            refused()
    (entry,) = [e for e in nmjax.plan(Experts(), "2:4", X) if not e.sparse]
    assert entry.path == "experts/kernel"


class Tied(nn.Module):
    """Its head multiplies by what another layer holds."""

    read: str = "variables"

    def setup(self):
        self.table = nn.Embed(32, 16)
        self.hidden = nn.Dense(16)
        self.last = nn.Dense(16)

    def __call__(self, tokens):
        h = self.last(self.hidden(self.table(tokens)))
        if self.read == "variables":
            return h @ self.table.variables["params"]["embedding"].T
        if self.read == "get_variable":
            return 2 * (
                h @ jnp.transpose(self.table.get_variable("params", "embedding"))
            )
        if self.read == "rows":
            rows = self.table.variables["params"]["embedding"]
            signs = (rows > 0) & (rows <= 1) | (rows % 1 < 0)
            return h.sum() + sum(row.sum() for row in rows) / len(rows) + signs.sum()
        kernel = self.last.variables["params"]["kernel"]
        return h.sum() + (kernel**2).sum() - kernel[0, 0] + (-kernel).sum()


@pytest.mark.parametrize("read", ["variables", "get_variable", "rows", "kernel"])
def test_dense_parameters_may_be_read_by_hand(read):
    tokens = jnp.arange(8)[None]
    model = Tied(read)
    variables = model.init(KEY, tokens)
    rules = [nmjax.Rule("table/embedding|last", None), nmjax.Rule(".*", "2:4")]
    plan = nmjax.plan(model, rules, tokens)
    assert [entry.path for entry in plan.sparse] == ["hidden/kernel"]
    y = nmjax.sparsify(model, rules).apply(variables, tokens)
    baked = nmjax.bake(variables["params"], plan)
    np.testing.assert_allclose(y, model.apply({"params": baked}, tokens), rtol=1e-5)


def test_a_sparse_parameter_read_by_hand_is_refused():
    tokens, rules = jnp.arange(8)[None], [nmjax.Rule(".*/embedding", None)]
    rules += [nmjax.Rule(".*", "2:4")]
    model = nmjax.sparsify(Tied("kernel"), rules)
    message = r"last/kernel \(16, 16\): the model reads this parameter by hand"
    with pytest.raises(nmjax.PlanError, match=message):
        model.init(KEY, tokens)
    with pytest.raises(nmjax.PlanError, match=message):
        model.apply(Tied("kernel").init(KEY, tokens), tokens)


class Scaled(nn.Module):
    """Asks for what a kernel is, not for its values."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, name="layer")
        y = layer(x)
        kernel = layer.variables["params"]["kernel"]
        assert kernel.dtype == jnp.float32 and kernel.size == 128 and kernel.ndim == 2
        return y / kernel.shape[0]


def test_the_shape_of_a_sparse_kernel_may_be_read():
    variables, plan = Scaled().init(KEY, X), nmjax.plan(Scaled(), "2:4", X)
    assert plan["layer/kernel"].sparse
    y = nmjax.sparsify(Scaled(), "2:4").apply(variables, X)
    baked = nmjax.bake(variables["params"], plan)
    np.testing.assert_allclose(y, Scaled().apply({"params": baked}, X), rtol=1e-5)


class ByHand(nn.Module):
    """Layers of one shape, applied by jax's own scan."""

    def setup(self):
        stack = nn.vmap(
            nn.Dense,
            in_axes=None,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=3,
        )
        self.layers = stack(16)

    def __call__(self, x):
        if self.is_initializing():
            return self.layers(x)
        layer = nn.Dense(16, parent=None)
        step = lambda h, params: (layer.apply({"params": params}, h), None)  # noqa: E731
        return jax.lax.scan(step, x, self.layers.variables["params"])[0]


def test_weights_that_a_model_scans_itself_are_refused():
    variables = ByHand().init(KEY, X)
    ByHand().apply(variables, X)
    message = "layers/kernel: a layer reads 2 of its 3 axes.*nn.scan"
    with pytest.raises(nmjax.PlanError, match=message):
        nmjax.sparsify(ByHand(), "2:4").apply(variables, X)


# What a call returns


class Returns(nn.Module):
    what: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8)(x)
        return {"unordered": {"z": y, "a": y}, "unsorted": {1: y, "a": y}}[self.what]


@pytest.mark.parametrize("what", ["unordered", "unsorted"])
@pytest.mark.parametrize("mutable", [False, ["batch_stats"]])
def test_a_result_comes_back_as_it_is(what, mutable):
    variables = Returns(what).init(KEY, X)
    out = nmjax.sparsify(Returns(what), "2:4").apply(variables, X, mutable=mutable)
    expected = Returns(what).apply(variables, X, mutable=mutable)
    out, expected = (o[0] if mutable else o for o in (out, expected))
    assert list(out) == list(expected)


def test_a_densified_model_may_be_part_of_another():
    sparse = nmjax.sparsify(nn.Dense(8), "2:4")

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nmjax.densify(sparse)(x)

    assert list(Outer().init(KEY, X)["params"]) == ["Dense_0"]


# Gradients within a model, and weights that it computes


class InnerGradient(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, name="layer")
        y, vjp = nn.vjp(lambda layer, x: layer(x), layer, x)
        return y, vjp(jnp.ones_like(y))[0]


@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_within_a_model_are_arrays(jitted):
    model = InnerGradient()
    variables = model.init(KEY, X)
    apply = nmjax.sparsify(model, nmjax.recipes.ste("2:4")).apply
    _, gradient = (jax.jit(apply) if jitted else apply)(variables, X)
    _, expected = model.apply(variables, X)
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)


def centred(w):
    return w - w.mean(-2, keepdims=True)


def behind_a_barrier(w):
    return jax.lax.optimization_barrier((jax.device_put(w), w))[0]


class Mapped(nn.Module):
    """A layer of transformed weights, inside another transformation."""

    lift: str
    change: Callable = centred

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _=None):
                return nn.Dense(16, use_bias=False, name="d")(x), None

        body = nn.map_variables(
            Body,
            "params",
            trans_in_fn=lambda variables: jax.tree.map(self.change, variables),
            init=self.is_initializing(),
            mutable=self.is_initializing(),
        )
        body = {
            "none": lambda body: body,
            "remat": nn.remat,
            "jit": nn.jit,
            "scan": lambda body: nn.scan(
                body,
                length=2,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            ),
        }[self.lift](body)
        return body(name="mapped")(x, None)[0]


@pytest.mark.parametrize("lift", ["none", "remat", "jit", "scan"])
def test_transformed_weights_are_refused(lift):
    model = Mapped(lift)
    variables = model.init(KEY, X)
    sparse = nmjax.sparsify(model, "2:4")
    with pytest.raises(nmjax.PlanError, match="mapped/d/kernel: the model transforms"):
        sparse.apply(variables, X)
    with pytest.raises(nmjax.PlanError, match="mapped/d/kernel: the model transforms"):
        nmjax.plan(model, "2:4", X)


@pytest.mark.parametrize("change", [jax.lax.stop_gradient, behind_a_barrier])
@pytest.mark.parametrize("lift", ["none", "remat", "scan"])
def test_weights_that_are_moved_alone_are_sparse(lift, change):
    model = Mapped(lift, change)
    variables, plan = model.init(KEY, X), nmjax.plan(model, "2:4", X)
    assert [entry.path for entry in plan.sparse] == ["mapped/d/kernel"]
    y = nmjax.sparsify(model, "2:4").apply(variables, X)
    baked = nmjax.bake(variables["params"], plan)
    np.testing.assert_allclose(y, model.apply({"params": baked}, X), rtol=1e-5)


class Adapted(nn.Module):
    """One step of an inner loop, as of MAML."""

    def setup(self):
        self.net = nn.Dense(8)

    def __call__(self, x):
        self.net(x)
        net, variables = self.net.unbind()
        return net.apply(jax.tree.map(lambda w: 0.5 * w, variables), x)


def test_weights_of_an_inner_loop_are_refused_by_their_path():
    variables = Adapted().init(KEY, X)
    sparse = nmjax.sparsify(Adapted(), "2:4")
    with pytest.raises(nmjax.PlanError, match="^net/kernel: the model transforms"):
        sparse.apply(variables, X)
