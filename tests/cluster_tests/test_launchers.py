"""What launchers say, read as they mean it; JAX's own readers are asked where it has some."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.clusters import cloud_tpu_cluster, ompi_cluster, slurm_cluster

from l32jax.cluster import Cluster, find, launchers
from l32jax.errors import InputError

SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu-[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
EXPLICIT = {
    "L32JAX_NUM_PROCESSES": "2",
    "L32JAX_PROCESS_ID": "1",
    "L32JAX_COORDINATOR": "first:1234",
}
TOOLBOX = {"NNODES": "2", "JAX_COORDINATOR_ADDRESS": "first:1234"}


@pytest.fixture
def tpu_machine(monkeypatch):
    monkeypatch.setattr(launchers, "has_tpu", lambda: True)


@pytest.fixture
def in_environ(monkeypatch):
    """JAX reads the process's environment alone."""

    def put(environ: dict[str, str]) -> dict[str, str]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return environ

    return put


def test_a_process_alone_is_in_no_cluster():
    assert find({}) is None
    assert find({"PATH": "/bin", "NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}) is None


@pytest.mark.parametrize(
    "environ",
    [
        EXPLICIT | {"L32JAX_NUM_PROCESSES": "1", "L32JAX_PROCESS_ID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu-08"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0"},
    ],
    ids=["explicit", "slurm", "tpu", "skypilot"],
)
def test_a_cluster_of_one_is_none(environ):
    assert find(environ) is None


def test_what_is_set_by_hand_goes_before_what_launchers_set():
    assert find(SLURM | EXPLICIT) == Cluster("L32JAX_*", 2, 1, "first:1234")


def test_a_coordinator_set_by_hand_replaces_the_launchers():
    found = find(SLURM | {"L32JAX_COORDINATOR": "10.1.1.1:5000"})
    assert found == find(SLURM)._replace(coordinator="10.1.1.1:5000")


@pytest.mark.parametrize("rank", ["NODE_RANK", "JOB_COMPLETION_INDEX"])
def test_nodes_and_ranks_of_containers(rank):
    assert find(TOOLBOX | {rank: "1"}) == Cluster("NNODES", 2, 1, "first:1234")


def test_skypilot_names_all_hosts_and_the_first_coordinates():
    environ = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NODE_RANK": "1"}
    hosts = ("10.0.0.1", "10.0.0.2")
    assert find(environ) == Cluster("SkyPilot", 2, 1, "10.0.0.1:8476", hosts)


def test_slurm_is_read_as_jax_reads_it(in_environ):
    in_environ(SLURM)
    found, theirs = find(SLURM), slurm_cluster.SlurmCluster
    assert found.coordinator == theirs.get_coordinator_address(None, None)
    assert (found.num_processes, found.process) == (theirs.get_process_count(), 3)
    assert found.hosts == ("gpu-08", "gpu-08", "gpu-09", "gpu-09", "gpu-10")
    assert found.local_device == theirs.get_local_process_id() == 1


def test_two_steps_of_a_slurm_job_use_two_ports():
    assert find(SLURM).coordinator != find(SLURM | {"SLURM_STEP_ID": "1"}).coordinator


def test_slurm_tasks_dealt_out_otherwise_have_no_known_hosts():
    assert find(SLURM | {"SLURM_DISTRIBUTION": "cyclic"}).hosts == ()


def test_one_task_a_node_has_all_its_accelerators():
    assert find(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}).local_device is None


def test_a_task_that_slurm_shows_one_gpu_takes_that():
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "1"}).local_device is None
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_device == 1


names = st.from_regex(r"[a-z][a-z-]{0,6}", fullmatch=True)
ranges = st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4))


@given(st.lists(st.tuples(names, st.lists(ranges, max_size=3)), min_size=1, max_size=4))
def test_node_lists_are_written_out(groups):
    texts, expected = [], []
    for name, spans in groups:
        parts = []
        for first, more, width in spans:
            parts.append(f"{first:0{width}}" + (f"-{first + more:0{width}}" if more else ""))
            expected += [f"{name}{number:0{width}}" for number in range(first, first + more + 1)]
        texts.append(f"{name}[{','.join(parts)}]" if parts else name)
        expected += [] if parts else [name]
    environ = SLURM | {
        "SLURM_STEP_NODELIST": ",".join(texts),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{len(expected)})",
        "SLURM_STEP_NUM_TASKS": str(len(expected)),
        "SLURM_PROCID": "0",
    }
    found = find(environ)
    assert found is None if len(expected) == 1 else found.hosts == tuple(expected)


@pytest.mark.parametrize(
    "uri",
    [
        "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        "1531576320.0;tcp://10.96.0.1:34911",
        "311558144.0;tcp://192.0.2.2:34627;tcp6://[fd00::2]:51959",
    ],
)
def test_open_mpi_is_read_as_jax_reads_it(uri, in_environ):
    found = find(in_environ(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri}))
    theirs = ompi_cluster.OmpiCluster
    assert found.coordinator == theirs.get_coordinator_address(None, None)
    assert (found.num_processes, found.process, found.local_device) == (4, 3, 1)


def test_open_mpi_may_have_only_newer_addresses():
    uri = "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"
    address, _, port = find(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri}).coordinator.rpartition(":")
    assert (address, int(port) >= 61440) == ("[fe80::b9b:ac5d]", True)


def test_newer_open_mpi_is_told_the_coordinator():
    with pytest.raises(InputError, match="set L32JAX_COORDINATOR"):
        find(OPEN_MPI)
    assert find(OPEN_MPI | {"L32JAX_COORDINATOR": "first:1"}).coordinator == "first:1"


SLICES = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
}


@pytest.mark.parametrize("slices", [{}, SLICES], ids=["one_slice", "three_slices"])
def test_tpu_containers_of_gke_are_read_as_jax_reads_them(slices, metadata, in_environ):
    in_environ({"GCE_METADATA_IP": metadata["address"]})
    metadata["tpu-env"] = ""  # which JAX asks for what the environment lacks
    names = {"TPU_WORKER_HOSTNAMES": "localhost,tpu-b", "TPU_WORKER_ID": "1"}
    found = find(in_environ(names | slices))
    assert as_jax_says(found, cloud_tpu_cluster.GkeTpuCluster)
    assert found.hosts == (() if slices else ("localhost", "tpu-b"))


@pytest.mark.parametrize("names", ["a,b", "a:8471,b:8471"])
def test_names_of_tpu_containers_may_have_ports_or_stand_in_a_file(names, tmp_path):
    (tmp_path / "names").write_text(names + "\n")
    expected = Cluster("GKE TPU", 2, 1, "a:8476", ("a", "b"))
    told = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    assert find(told | {"TPU_PROCESS_ADDRESSES": names}) == expected
    assert find(told | {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "names")}) == expected


def as_jax_says(found: Cluster, theirs) -> bool:
    assert found.coordinator.split(":")[0] == theirs.get_coordinator_address(1, None).split(":")[0]
    assert found.num_processes == theirs.get_process_count()
    return found.process == theirs.get_process_id()


@pytest.fixture
def metadata():
    """A server of a machine's metadata, as a TPU VM has one; its answers by key."""
    answers: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            text = answers.get(self.path.rpartition("/")[2])
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        answers["address"] = f"127.0.0.1:{server.server_port}"
        yield answers
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", ["localhost,10.0.0.2", "a:7:localhost,b:8:10.0.0.2"])
@pytest.mark.parametrize("slices", [{"MEGASCALE_NUM_SLICES": "1"}, SLICES], ids=["one", "three"])
def test_the_metadata_of_tpu_vms_are_read_as_jax_reads_them(
    workers, slices, metadata, in_environ, tpu_machine
):
    environ = in_environ({"GCE_METADATA_IP": metadata["address"]})
    metadata["agent-worker-number"] = "1"
    metadata["worker-network-endpoints"] = workers
    lines = {"ACCELERATOR_TYPE": "v5p-16", "MEGASCALE_COORDINATOR_ADDRESS": ""} | slices
    metadata["tpu-env"] = "".join(f"{name}: '{value}'\n" for name, value in lines.items())
    assert as_jax_says(find(environ), cloud_tpu_cluster.GceTpuCluster)


def test_a_tpu_without_metadata_is_alone(metadata, tpu_machine):
    environ = {"GCE_METADATA_IP": metadata["address"]}
    assert find(environ) is None
    metadata |= {"agent-worker-number": "0", "worker-network-endpoints": "a,b"}
    assert find(environ) is not None
    assert find(environ | {"TPU_SKIP_MDS_QUERY": "1"}) is None


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (EXPLICIT | {"L32JAX_PROCESS_ID": ""}, "L32JAX_PROCESS_ID"),
        (EXPLICIT | {"L32JAX_PROCESS_ID": "two"}, "'two'"),
        (EXPLICIT | {"L32JAX_PROCESS_ID": "2"}, "process 2 of 2"),
        (EXPLICIT | {"L32JAX_COORDINATOR": "first"}, "'first'"),
        ({"L32JAX_COORDINATOR": "first:1"}, "L32JAX_NUM_PROCESSES"),
        (TOOLBOX | {"NODE_RANK": "9"}, "process 9 of 2"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(environ, words):
    with pytest.raises(InputError, match=words) as raised:
        find(environ)
    assert "\n" not in str(raised.value)
