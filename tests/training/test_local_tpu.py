"""The TPU of a machine by what its file system and environment say; quiet where there is none."""

import http.server
import os
import subprocess
import sys
import threading

import pytest

from llama_jax.training.local_tpu import QUIET_ENVIRONMENT, has_tpu, local_tpu, quiet_absent_tpu

NETWORK_CARD = ("0x1ae0", "0x0042")  # Google's, on every VM of its cloud
GPU = ("0x10de", "0x2330")


def machine(root, *devices):
    """A file system with these (vendor, device) numbers on its PCI bus."""
    for number, (vendor, device) in enumerate(devices):
        folder = root / f"sys/bus/pci/devices/0000:00:{number:02x}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    return root


@pytest.fixture
def metadata_server():
    """Answers as Cloud's metadata server does for attributes; its address, and what it knows."""
    known = {}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = known.get(self.path.rpartition("/")[2])
            asked_rightly = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if value is not None and asked_rightly else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}", known
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("0x005e", "v4"),
        ("0x0062", "v5p"),
        ("0x0063", "v5e"),
        ("0x006F", "v6e"),
        ("0x0076", "tpu7x"),
    ],
)
def test_the_bus_tells_the_chip_and_no_server_is_asked_where_that_is_forbidden(
    tmp_path, device, chip
):
    root = machine(tmp_path, NETWORK_CARD, ("0x1ae0", device), ("0x1ae0", device))
    tpu = local_tpu({"TPU_SKIP_MDS_QUERY": "1"}, root)
    assert tpu is not None
    assert (tpu.chip.name, tpu.slice, tpu.num_devices, str(tpu)) == (chip, None, None, chip)


def test_a_tpu_vm_learns_its_slice_and_the_number_of_slices_from_the_metadata_server(
    tmp_path, metadata_server
):
    address, known = metadata_server
    known["accelerator-type"] = "v5litepod-16"
    known["tpu-env"] = "ZONE: 'us-west4-a'\nMEGASCALE_NUM_SLICES: '2'\n"
    root = machine(tmp_path, ("0x1ae0", "0x0063"))
    tpu = local_tpu({"GCE_METADATA_IP": address}, root)
    assert tpu is not None
    assert (str(tpu), tpu.num_devices) == ("2 x v5e-16", 32)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TPU_ACCELERATOR_TYPE": "v6e-16"}, ("v6e-16", 16)),
        # GKE names machines; the topology tells the size.
        ({"TPU_ACCELERATOR_TYPE": "tpu-v6e-slice", "TPU_TOPOLOGY": "8x8"}, ("v6e-64", 64)),
        ({"TPU_ACCELERATOR_TYPE": "v6e-16", "MEGASCALE_NUM_SLICES": "4"}, ("4 x v6e-16", 64)),
        # Of another machine, or of one that is newer than the table: the chip alone is sure.
        ({"TPU_ACCELERATOR_TYPE": "v5p-8"}, ("v6e", None)),
        ({"TPU_ACCELERATOR_TYPE": "v6e-100000"}, ("v6e", None)),
    ],
)
def test_the_environment_tells_the_slice_where_it_does(tmp_path, environment, expected):
    root = machine(tmp_path, ("0x1ae0", "0x006f"))
    tpu = local_tpu({**environment, "TPU_SKIP_MDS_QUERY": "1"}, root)
    assert (str(tpu), tpu.num_devices if tpu else None) == expected


def test_a_metadata_server_without_an_answer_leaves_the_chip_alone(tmp_path, metadata_server):
    address, _ = metadata_server
    root = machine(tmp_path, ("0x1ae0", "0x0063"))
    for server in (address, "localhost:9"):  # not found; nobody listens
        assert str(local_tpu({"GCE_METADATA_IP": server}, root)) == "v5e"


def test_where_nothing_speaks_for_a_tpu_libtpu_is_kept_quiet(tmp_path):
    environment = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "0"}
    root = machine(tmp_path, NETWORK_CARD, GPU)
    assert local_tpu(environment, root) is None
    quiet_absent_tpu(environment, root)
    # What somebody has set stays.
    assert environment == {**QUIET_ENVIRONMENT, "ALLOW_MULTIPLE_LIBTPU_LOAD": "0"}


@pytest.mark.parametrize("told_by", ["bus", "old chip", "accel", "vfio", "environment"])
def test_a_machine_that_may_have_a_tpu_is_left_alone_so_that_its_failures_show(tmp_path, told_by):
    environment = {"TPU_WORKER_HOSTNAMES": "10.0.0.2"} if told_by == "environment" else {}
    if told_by in ("bus", "old chip"):
        machine(tmp_path, ("0x1ae0", "0x0063" if told_by == "bus" else "0x0027"))
    if told_by in ("accel", "vfio"):
        file = tmp_path / {"accel": "dev/accel0", "vfio": "dev/vfio/0"}[told_by]
        file.parent.mkdir(parents=True)
        file.touch()
    before = dict(environment)
    assert has_tpu(environment, tmp_path)
    quiet_absent_tpu(environment, tmp_path)
    assert environment == before


def without_tpu_settings():
    """This process's environment as a new user's: nothing said about platforms or TPUs."""
    ours = ("JAX_PLATFORMS", "TPU_", "ALLOW_MULTIPLE_LIBTPU", "LIBTPU")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.mark.short
def test_jax_starts_on_the_cpu_beside_libtpu_without_a_word():
    pytest.importorskip("libtpu")
    if has_tpu(without_tpu_settings()):
        pytest.skip("this machine has a TPU")
    code = (
        "from llama_jax.training.local_tpu import quiet_absent_tpu; quiet_absent_tpu(); "
        "import jax; print(jax.devices()[0].platform)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=without_tpu_settings(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) in {("cpu", ""), ("gpu", "")}


@pytest.mark.slow
def test_a_verb_starts_on_the_cpu_beside_libtpu_without_a_word():
    pytest.importorskip("libtpu")
    if has_tpu(without_tpu_settings()):
        pytest.skip("this machine has a TPU")
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.cli.main", "doctor", "--json"],
        env=without_tpu_settings(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert '"platform": ' in done.stdout
