"""The scripts of tpu/ against a pretended cloud: what they ask of it, and what they say."""

import re

import pytest

COMMAND = ["--", "llama-jax", "train", "tiny"]


def test_create_asks_for_the_slice_waits_for_it_and_says_how_to_delete_it(cloud):
    done = cloud.run("create")
    assert done.returncode == 0, done.stderr
    (create,) = (call for call in cloud.calls if "queued-resources create" in call)
    assert create == (
        "compute tpus queued-resources create small --project=our-project --zone=us-west4-a "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=small "
        "--spot --quiet"
    )
    assert "small: WAITING_FOR_RESOURCES\nsmall: ACTIVE\n" in done.stdout
    assert "16 chips, 24.00 an hour. Delete it with: tpu/delete.sh" in done.stderr


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"SLICE_TIER": "on-demand", "SLICE_ACCELERATOR_TYPE": "v5p-8"},
            "--runtime-version=v2-alpha-tpuv5 --node-id=small --quiet",
        ),
        (
            {"SLICE_TIER": "reserved", "SLICE_ACCELERATOR_TYPE": "v6e-8"},
            "--runtime-version=v2-alpha-tpuv6e --node-id=small --reserved --quiet",
        ),
        (
            {"SLICE_COUNT": "2", "SLICE_ACCELERATOR_TYPE": "v4-8"},
            "--runtime-version=tpu-ubuntu2204-base --node-count=2 --node-prefix=small --spot",
        ),
        (
            {"SLICE_NETWORK": "n", "SLICE_SUBNETWORK": "s", "SLICE_SERVICE_ACCOUNT": "a"},
            "--spot --network=n --subnetwork=s --service-account=a",
        ),
    ],
)
def test_create_asks_by_the_settings(cloud, settings, parts):
    assert cloud.run("create", **settings).returncode == 0
    assert cloud.count(parts) == 1


def test_without_capacity_create_gives_up_waiting_and_says_that_the_request_stays(cloud):
    cloud.play(grant_after=-1)
    done = cloud.run("create", SLICE_WAIT_S="1", SLICE_POLL_S="1")
    assert done.returncode == 1
    assert "no capacity within 1 s. The request stays in the queue" in done.stderr
    assert "Delete it with: tpu/delete.sh" in done.stderr


def test_a_refused_request_a_taken_name_and_a_login_that_is_missing_are_errors(cloud):
    cloud.play(refuse=["ERROR: Quota 'TPUV5sLitepodPerProjectPerZone' exceeded."])
    refused = cloud.run("create")
    assert refused.returncode == 1
    assert "Quota" in refused.stderr
    assert "the request was refused" in refused.stderr
    assert cloud.run("create").returncode == 0
    taken = cloud.run("create")
    assert taken.returncode == 1
    assert "small exists already and is ACTIVE" in taken.stderr
    cloud.play(failing=["describe"])
    for script in ("create", "delete"):
        unknown = cloud.run(script)
        assert unknown.returncode == 1
        assert "can't ask about small" in unknown.stderr
    assert cloud.count("queued-resources delete") == 0


def test_setup_puts_this_checkout_on_every_worker_and_installs_it_from_the_pins(cloud):
    cloud.play(workers=2)
    assert cloud.run("create").returncode == 0
    done = cloud.run("setup")
    assert done.returncode == 0, done.stderr
    for worker in range(2):
        home = cloud.machine("small", worker)
        assert (home / "llama-jax/llama_jax/cli/main.py").is_file()
        assert (home / "llama-jax/.venv/bin/llama-jax").is_file()  # kept
        assert not (home / "llama-jax/.git").exists()
        installs = (home / "installs").read_text()
        assert re.search(r"-m pip install --quiet -c constraints/py31\d.txt -e \.\[tpu\]", installs)
    assert "next: tpu/launch.sh -- llama-jax train RUN --run-dir gs://bucket/run" in done.stdout


def test_setup_with_a_worker_that_does_not_answer_fails_and_names_its_node(cloud):
    cloud.play(workers=2)
    assert cloud.run("create", SLICE_COUNT="2").returncode == 0
    cloud.play(dead=["small-1/0"])
    done = cloud.run("setup", SLICE_COUNT="2")
    assert done.returncode == 1
    assert "Connection timed out" in done.stderr
    assert "setting up small-1 failed" in done.stderr


def test_setup_from_git_has_the_workers_fetch_that_commit(cloud):
    assert cloud.run("create").returncode == 0
    cloud.run("setup", SLICE_SOURCE="https://example.com/llama-jax.git#v1.0")
    assert cloud.count("git fetch -q --depth 1 https://example.com/llama-jax.git v1.0") == 1
    assert cloud.count("scp") == 0


def prepared(cloud, **world):
    cloud.play(**world)
    assert cloud.run("create").returncode == 0
    assert cloud.run("setup").returncode == 0


def test_launch_starts_the_same_command_on_every_worker_with_the_run_directory(cloud):
    prepared(cloud, workers=2)
    done = cloud.run("launch", *COMMAND)
    assert done.returncode == 0, done.stderr
    for worker in range(2):
        job = cloud.machine("small", worker) / "llama-jax-job"
        command = (job / "command").read_text().strip()
        assert command == "llama-jax train tiny --run-dir gs://bucket/run"
    # A second launch would be a second run on the same chips.
    again = cloud.run("launch", *COMMAND)
    assert again.returncode == 1
    assert "a command is running already: llama-jax train tiny" in again.stderr
    logs = cloud.run("logs", "--worker", "1", "--no-follow")
    assert "llama-jax train tiny --run-dir gs://bucket/run" in logs.stdout


def test_a_folder_of_one_vm_is_no_run_directory_for_several(cloud):
    prepared(cloud, workers=2)
    done = cloud.run("launch", "--", "llama-jax", "train", "tiny", "--run-dir", "runs/tiny")
    assert done.returncode == 2
    assert "must be one that all see: gs://BUCKET/FOLDER" in done.stderr
    cloud.play(workers=1)
    assert cloud.run("launch", *COMMAND, "--run-dir", "runs/tiny").returncode == 0


def test_launch_with_a_worker_that_does_not_answer_says_so(cloud):
    prepared(cloud, workers=2)
    cloud.play(dead=["small/1"])
    done = cloud.run("launch", *COMMAND)
    assert done.returncode == 1
    assert "not every worker started it" in done.stderr


def test_fetch_copies_from_the_bucket_or_from_the_first_worker(cloud):
    assert cloud.run("fetch").returncode == 0
    assert (
        cloud.calls[-1]
        == "storage rsync --recursive --project=our-project gs://bucket/run runs/small"
    )
    assert cloud.run("fetch", "--to", "here", SLICE_RUN_DIR="runs/tiny").returncode == 0
    assert "scp --recurse small:runs/tiny/. here" in cloud.calls[-1]
    assert (cloud.folder / "here").is_dir()


def test_delete_deletes_the_request_with_its_nodes_and_sees_that_it_is_gone(cloud):
    assert cloud.run("create").returncode == 0
    done = cloud.run("delete")
    assert done.returncode == 0, done.stderr
    assert (
        cloud.count(
            "queued-resources delete small --project=our-project --zone=us-west4-a --force --quiet"
        )
        == 1
    )
    assert cloud.world["request"] == "ABSENT"
    again = cloud.run("delete")
    assert again.returncode == 0
    assert "nothing to delete" in again.stdout


def test_status_lists_what_runs_anywhere_in_the_project_and_what_it_costs(cloud):
    assert "nothing is running" in cloud.run("status").stdout
    cloud.run("create", SLICE_COUNT="2")
    done = cloud.run("status")
    assert done.stdout.splitlines() == [
        "node small-0, us-west4-a, v5litepod-16, READY: 16 chips, 24.00 an hour",
        "node small-1, us-west4-a, v5litepod-16, READY: 16 chips, 24.00 an hour",
        "request small, ACTIVE",
        "running: 32 chips, 48.00 an hour",
    ]
    assert "--zone=-" in cloud.calls[-1]
    assert (
        "SLICE_PRICE_PER_CHIP_HOUR isn't set"
        in cloud.run("status", SLICE_PRICE_PER_CHIP_HOUR=None).stdout
    )


@pytest.mark.parametrize(
    ("script", "arguments", "commands"),
    [
        ("create", [], ["queued-resources create", "queued-resources describe"]),
        ("setup", [], ["tpu-vm scp", "tpu-vm ssh"]),
        ("launch", COMMAND, ["tpu-vm ssh"]),
        ("logs", [], ["tpu-vm ssh"]),
        ("watch", COMMAND, ["queued-resources describe", "tpu-vm describe", "tpu-vm ssh"]),
        ("fetch", [], ["storage rsync"]),
        ("delete", [], ["queued-resources delete"]),
        ("status", [], ["tpu-vm list", "queued-resources list"]),
    ],
)
def test_a_dry_run_prints_every_command_and_does_none(cloud, script, arguments, commands):
    done = cloud.run(script, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    for command in commands:
        assert re.search(rf"^\+ gcloud .*{command}", done.stderr, re.MULTILINE), command
    assert cloud.calls == []
    assert not (cloud.folder / "runs").exists()


def test_a_config_file_gives_settings_and_the_environment_wins(cloud):
    file = cloud.folder / "my.conf"
    file.write_text('# mine\nSLICE_NAME="other"\nSLICE_TIER=on-demand\nSLICE_ZONE=nowhere\n')
    done = cloud.run("create", "--config", str(file), SLICE_NAME=None)
    assert done.returncode == 0, done.stderr
    assert cloud.count("queued-resources create other --project=our-project --zone=us-west4-a") == 1
    assert cloud.count("--spot") == 0
    assert f"tpu/delete.sh --config {file}" in done.stderr


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({"SLICE_NAME": None}, "", "SLICE_NAME isn't set"),
        ({}, "SLICE_NAM=x\n", "my.conf:1: unknown setting SLICE_NAM"),
        ({}, "\nrm -rf /\n", "my.conf:2: not of the form NAME=value"),
        ({"SLICE_TIER": "cheap"}, "", "SLICE_TIER is 'cheap'"),
        ({"SLICE_ACCELERATOR_TYPE": "v5e-16"}, "", "runtime version"),
        ({"SLICE_ACCELERATOR_TYPE": "tpu7x-8"}, "", "set SLICE_RUNTIME_VERSION, or use GKE"),
        ({"SLICE_COUNT": "two"}, "", "SLICE_COUNT is 'two', not a whole number"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line_and_nothing_is_asked(
    cloud, settings, text, message
):
    file = cloud.folder / "my.conf"
    file.write_text(text)
    done = cloud.run("create", "--config", str(file), **settings)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert message in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    "script", ["create", "setup", "launch", "logs", "watch", "fetch", "delete", "status"]
)
def test_help_is_the_scripts_head_and_a_wrong_option_is_told(cloud, script):
    shown = cloud.run(script, "--help")
    assert shown.returncode == 0
    assert f"tpu/{script}.sh [" in shown.stdout
    assert "shellcheck" not in shown.stdout
    wrong = cloud.run(script, "--dryrun")
    assert wrong.returncode == 2
    assert "unknown option '--dryrun'" in wrong.stderr


IMAGE = "us-docker.pkg.dev/p/r/llama-jax"


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        (["image"], ["docker build --file [^ ]*/tpu/Dockerfile --tag", f"docker push {IMAGE}"]),
        (["cluster"], ["xpk cluster create --cluster=small .* --num-slices=4 --spot"]),
        (
            ["start", "--max-restarts", "7", *COMMAND],
            [
                "xpk workload create .*--tpu-type=v5litepod-16 --num-slices=4 --workload=small "
                f"--docker-image={IMAGE} --max-restarts=7 --command=.*gs://bucket/run"
            ],
        ),
        (["list"], ["xpk workload list"]),
        (["stop"], ["xpk workload delete .*--workload=small"]),
        (["delete"], ["xpk cluster delete --cluster=small"]),
    ],
)
def test_the_gke_example_prints_what_it_would_do(cloud, arguments, commands):
    verb, *rest = arguments
    done = cloud.run("xpk", verb, "--dry-run", *rest, SLICE_IMAGE=IMAGE, SLICE_COUNT="4")
    assert done.returncode == 0, done.stderr
    for command in commands:
        assert re.search(rf"^\+ {command}", done.stderr, re.MULTILINE), done.stderr
    assert cloud.calls == []


def test_the_gke_example_runs_xpk_and_says_how_to_delete_the_cluster(cloud):
    record = cloud.folder / "xpk.txt"
    program = cloud.folder / "bin" / "xpk"
    program.write_text(f'#!/bin/sh\necho "$*" >>{record}\nexit 3\n')
    program.chmod(0o755)
    done = cloud.run("xpk", "cluster", SLICE_IMAGE=IMAGE)
    assert done.returncode == 1
    assert record.read_text().startswith("cluster create --cluster=small --project=our-project")
    assert "the cluster was not made" in done.stderr
    assert "Delete it with: tpu/xpk.sh delete" in done.stderr
    wrong = cloud.run("xpk", "begin")
    assert wrong.returncode == 2
    assert "unknown verb 'begin'" in wrong.stderr
