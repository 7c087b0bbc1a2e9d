"""Every mesh computes the same; parameters are born where the tables say."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax import sharding
from l32jax.config import AttentionConfig, MeshConfig
from l32jax.config_text import override
from l32jax.data.batches import place
from l32jax.data.rows import Batch, make_row, stack
from l32jax.data.samples import Sample
from l32jax.errors import InputError
from l32jax.kernels.context import row_order
from l32jax.model.llama import AUTO, abstract_params, batch_logits, bind, init_params
from l32jax.model.parameters import flatten, on_mesh
from l32jax.run_config import TrainConfig
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train.objectives import cross_entropy
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import IMAGE_ID, LENGTH, MODEL, VISION

LIMIT = 1e-5
MESHES = {
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp8": MeshConfig(fsdp=8),
    "fsdp4_tensor2": MeshConfig(fsdp=4, tensor=2),
    "context4_fsdp2": MeshConfig(context=4, fsdp=2),
    "data2_context2_tensor2": MeshConfig(data=2, fsdp=1, context=2, tensor=2),
}
# The other products of axes; each by itself as well.
MORE_MESHES = {
    "data8": MeshConfig(data=8, fsdp=1),
    "context8": MeshConfig(fsdp=1, context=8),
    "tensor2": MeshConfig(fsdp=1, tensor=2),
    "data2_fsdp4": MeshConfig(data=2, fsdp=4),
    "data2_context4": MeshConfig(data=2, fsdp=1, context=4),
    "data4_tensor2": MeshConfig(data=4, fsdp=1, tensor=2),
    "fsdp2_context2_tensor2": MeshConfig(fsdp=2, context=2, tensor=2),
    "context4_tensor2": MeshConfig(fsdp=1, context=4, tensor=2),
    "data2_fsdp2_context2": MeshConfig(data=2, fsdp=2, context=2),
}
CONTEXT = [
    ("context4_fsdp2", AttentionConfig(across="ring")),
    ("context4_fsdp2", AttentionConfig(vision_keys="replicated")),
    ("data2_context2_tensor2", AttentionConfig(across="ring")),
]

# Dimensions of the parameters by the ends of their paths; l is the stacked axis.
DIMS = {
    "decoder/embedding/weight": "vd",
    "decoder/image_embedding/weight": "_d",
    "query/weight": "lnhd",
    "out/weight": "ldnh",
    "gate/weight": "lfd",
    "up/weight": "lfd",
    "down/weight": "ldf",
    "up/bias": "lf",
    "patch_embedding/weight": "de",
    "projector/weight": "de",
}
AXES = {"d": "fsdp", "f": "tensor", "n": "tensor", "k": "tensor", "v": "tensor"}


def packed_rows() -> Batch:
    """Three documents end to end in each of eight rows, one of them with an image but for some."""
    random = np.random.default_rng(0)

    def sample(count: int, pictures=()) -> Sample:
        tokens = [*[IMAGE_ID] * len(pictures), *random.integers(0, 256, count).tolist()]
        return Sample.single(tokens, random.random(len(tokens)).tolist(), pictures)

    def row(index: int) -> Batch:
        picture = random.integers(0, 256, (28 * (1 + index % 2), 28, 3), np.uint8)
        samples = [sample(4), sample(5, [picture] if index % 3 else []), sample(3)]
        return make_row(samples, length=LENGTH, vision=VISION)

    return stack([row(index) for index in range(8)])


@partial(jax.jit, static_argnums=(0, 3))
def logits_and_gradients(config, params, batch, attention):
    def loss(params):
        logits = batch_logits(bind(config, params), batch, attention=attention)
        loss = jnp.sum(cross_entropy(logits, batch["targets"]) * batch["weights"])
        return loss / batch["weights"].sum(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradients


def computed_on(mesh, attention=AUTO):
    with jax.set_mesh(mesh):
        batch = place(packed_rows(), mesh)
        params = random_params(MODEL, mesh)
        logits, gradients = logits_and_gradients(MODEL, params, batch, attention)
    in_row = row_order(logits.shape[1], mesh.shape["context"])
    found = {name: np.asarray(g) for name, g in flatten(gradients).items()}
    return np.asarray(logits)[:, in_row], found


@pytest.fixture(scope="module")
def alone():
    return computed_on(single_device_mesh())


@pytest.mark.parametrize(("name", "attention"), [*((name, AUTO) for name in MESHES), *CONTEXT])
def test_every_mesh_gives_the_same_logits_and_gradients(name, attention, alone):
    assert_same(computed_on(make_mesh(MESHES[name]), attention), alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_MESHES)
def test_so_does_every_other_product_of_axes(name, alone):
    config = MORE_MESHES[name]
    used = math.prod(size for size in dataclasses.astuple(config))
    devices = jax.devices()[:used] if used > 0 else jax.devices()
    assert_same(computed_on(make_mesh(config, devices)), alone)


def assert_same(found, alone) -> None:
    logits, gradients = found
    np.testing.assert_allclose(logits, alone[0], rtol=0, atol=LIMIT * np.abs(alone[0]).max())
    largest = max(np.abs(gradient).max() for gradient in alone[1].values())
    for path, gradient in alone[1].items():
        assert gradient.any(), path
        np.testing.assert_allclose(
            gradients[path], gradient, rtol=0, atol=LIMIT * largest, err_msg=path
        )


def expected_spec(path: str) -> tuple:
    of_text = path.startswith("decoder")
    heads = "lkhd" if of_text else "lnhd"  # the image encoder does not group its queries
    known = {**DIMS, "key/weight": heads, "value/weight": heads}
    dims = next((dims for end, dims in known.items() if path.endswith(end)), "")
    return tuple(AXES.get(dim) for dim in dims)


def assert_as_the_tables_say(path: str, leaf) -> None:
    expected = expected_spec(path)
    spec = tuple(leaf.sharding.spec)
    assert (*spec, *[None] * (leaf.ndim - len(spec))) == (
        *expected,
        *[None] * (leaf.ndim - len(expected)),
    ), path


@pytest.mark.parametrize("name", MESHES)
def test_specs_are_those_of_the_tables_on_every_mesh(name):
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        shapes = on_mesh(abstract_params(MODEL), mesh)
    for path, leaf in flatten(shapes).items():
        assert_as_the_tables_say(path, leaf)


@pytest.mark.slow
def test_parameters_are_born_on_their_devices():
    mesh = make_mesh(MESHES["data2_fsdp2_tensor2"])
    with jax.set_mesh(mesh):
        params = jax.jit(partial(init_params, MODEL))(jax.random.key(0))
    for path, leaf in flatten(params).items():
        assert_as_the_tables_say(path, leaf)
        parts = np.prod([mesh.shape[axis] for axis in expected_spec(path) if axis])
        for shard in leaf.addressable_shards:
            assert shard.data.size * parts == leaf.size, path


def test_a_free_axis_takes_what_the_others_leave():
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {
        "data": 1,
        "fsdp": 4,
        "context": 1,
        "tensor": 2,
    }
    assert make_mesh(MeshConfig(data=-1, fsdp=1)).shape["data"] == 8
    assert set(single_device_mesh().shape.values()) == {1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1}, "-1 may stand once"),
        ({"data": 0}, "sizes are positive"),
        ({"data": -2}, "sizes are positive"),
        ({"fsdp": 4}, "does not cover the 8 devices"),
        ({"data": 3}, "does not cover the 8 devices"),
        ({"data": 16}, "does not cover the 8 devices"),
    ],
)
def test_meshes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("data=2,fsdp=16,context=1,tensor=8", MeshConfig(data=2, fsdp=16, tensor=8)),
        ("tensor=8", MeshConfig(fsdp=-1, tensor=8)),
        ("data=-1, tensor=2", MeshConfig(data=-1, fsdp=1, tensor=2)),
        ("", MeshConfig()),
    ],
)
def test_a_mesh_is_one_line(spec, expected):
    assert MeshConfig.parse(spec) == expected
    run = TrainConfig(model=MODEL, stages=(), directory="runs/none")
    assert override(run, f"mesh={spec or 'fsdp=-1'}").mesh == expected


@pytest.mark.parametrize(
    "spec", ["fsdp", "fsdp=", "fsdp=two", "model=2", "fsdp=2,fsdp=4", "fsdp=--2"]
)
def test_a_mesh_that_says_something_else_is_refused(spec):
    with pytest.raises(InputError, match="in mesh"):
        MeshConfig.parse(spec)


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """What arranging asks of a device of v4 and later: its place in a torus, and its slice."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0


def slices_of_chips(count: int, sides=(2, 2, 2)) -> list[FakeTpu]:
    places = [(x, y, z) for z in range(sides[2]) for y in range(sides[1]) for x in range(sides[0])]
    return [
        FakeTpu(len(places) * number + place, coords, number)
        for number in range(count)
        for place, coords in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (MeshConfig(data=2, fsdp=4, tensor=2), {"data": 2}),
        (MeshConfig(data=4, fsdp=4), {"data": 2}),
        (MeshConfig(fsdp=16), {"fsdp": 2}),
        (MeshConfig(data=1, fsdp=8, tensor=2), {"fsdp": 2}),
    ],
)
def test_slices_are_told_apart_by_the_first_axes(config, apart):
    """Along all others, neighbours are chips of the same slice."""
    devices = sharding._arranged([*config.sizes(16).values()], slices_of_chips(2))
    numbers = np.vectorize(lambda device: device.slice_index)(devices)
    for axis, name in enumerate(("data", "fsdp", "context", "tensor")):
        parts = np.array_split(numbers, apart.get(name, 1), axis=axis)
        assert all((np.diff(part, axis=axis) == 0).all() for part in parts), name


def test_an_axis_lies_along_the_wires_of_a_torus():
    """The innermost axis takes whole axes of the machine: its devices are next to each other."""
    devices = sharding._arranged([1, 2, 1, 4], slices_of_chips(1))
    for row in devices.reshape(2, 4):
        varying = [len({device.coords[axis] for device in row}) for axis in range(3)]
        assert sorted(varying) == [1, 2, 2]


def processes_of(count: int, rows: int, devices: int) -> np.ndarray:
    """Of the devices of each part of the rows: neighbours are of one process, while it has some."""
    return (np.arange(rows * devices) * count // (rows * devices)).reshape(rows, devices)


@pytest.mark.parametrize(
    ("count", "rows", "devices", "shares"),
    [
        (4, 4, 1, (0, 1, 2, 3)),
        (4, 8, 1, (0, 1, 2, 3)),  # two parts each
        (4, 1, 4, (0, 0, 0, 0)),  # each row is split over all
        (4, 2, 2, (0, 0, 1, 1)),  # and over pairs
        (2, 2, 2, (0, 1)),
    ],
)
def test_processes_that_split_rows_feed_the_same(count, rows, devices, shares):
    processes = processes_of(count, rows, devices)
    found = [sharding._share_of(processes, own) for own in range(count)]
    assert found == [(share, len(set(shares))) for share in shares]


def test_processes_that_share_rows_in_part_are_refused():
    with pytest.raises(InputError, match="share a part of their rows"):
        sharding._share_of(processes_of(2, 3, 2), 0)  # the part in the middle is of both
