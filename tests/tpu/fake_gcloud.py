"""A `gcloud` for tests: records every call, keeps one slice of pretended VMs, and plays failures.

Workers are folders; what is sent over ssh runs there for real, by bash, with the folder as home.
The folder of the environment variable FAKE_CLOUD holds `world.json` and `calls.jsonl`. The world:

  request      ABSENT, WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
  node         state of each node, READY or PREEMPTED
  workers      of each node
  dead         "node/number" of workers that don't answer ssh
  refuse       messages with which the next requests are refused
  grant_after  looks at the request until it is granted; -1 never
  on_job_look  what happens at the n-th question for the state of the job: {"3": "preempt"}
  failing      substrings of calls that fail, as for somebody who isn't logged in
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_CLOUD"])
START = {
    "request": "ABSENT", "node": "READY", "workers": 1, "dead": [], "refuse": [], "grant_after": 1,
    "on_job_look": {}, "failing": [], "nodes": [], "looks": 0, "job_looks": 0,
}  # fmt: skip


def main(arguments):
    world = {**START, **json.loads((FOLDER / "world.json").read_text())}
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    line = " ".join(arguments)
    if any(part in line for part in world["failing"]):
        return tell("ERROR: (gcloud) You do not currently have an active account selected.", 1)
    words = [word for word in arguments if not word.startswith("-")]
    options = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    action = "_".join(words[2:4] if words[0] == "compute" else words[:2]).replace("-", "_")
    code = globals()[action](world, words[4:], options)
    (FOLDER / "world.json").write_text(json.dumps(world))
    return code


def queued_resources_create(world, words, options):
    if world["refuse"]:
        return tell(world["refuse"].pop(0), 1)
    count = int(options.get("node-count", 1))
    world["nodes"] = (
        [options["node-id"]]
        if count == 1
        else [f"{options['node-prefix']}-{n}" for n in range(count)]
    )
    world.update(request="WAITING_FOR_RESOURCES", node="READY", looks=0, dead=[])
    for home in homes(world):
        make_machine(home)
    return 0


def queued_resources_describe(world, words, options):
    if world["request"] == "ABSENT":
        return tell("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found", 1)
    if world["request"] == "WAITING_FOR_RESOURCES":
        world["looks"] += 1
        if 0 <= world["grant_after"] < world["looks"]:
            world["request"] = "ACTIVE"
    print(world["request"])
    return 0


def queued_resources_delete(world, words, options):
    for home in homes(world):
        stop(home)
        shutil.rmtree(home)
    world.update(request="ABSENT", nodes=[])
    return 0


def queued_resources_list(world, words, options):
    if world["request"] != "ABSENT":
        print(f"{world['name']}\t{world['request']}")
    return 0


def tpu_vm_list(world, words, options):
    for node in world["nodes"]:
        print(f"{node}\tus-west4-a\tv5litepod-16\t{world['node']}")
    return 0


def tpu_vm_describe(world, words, options):
    print(world["workers"] if "networkEndpoints" in options["format"] else world["node"])
    return 0


def tpu_vm_ssh(world, words, options):
    if "worker.sh state" in options["command"]:
        world["job_looks"] += 1
        event = world["on_job_look"].get(str(world["job_looks"]))
        if event == "preempt":
            world.update(request="SUSPENDED", node="PREEMPTED")
        elif event:
            world["dead"].append(event)
    code = 0
    for home in homes(world, words[0], options["worker"]):
        if world["node"] != "READY" or f"{home.parent.name}/{home.name}" in world["dead"]:
            code = tell(f"ssh: connect to {home.name}: Connection timed out", 255)
            continue
        done = subprocess.run(["bash", "-c", options["command"]], cwd=home, env=environment(home))
        code = code or done.returncode
    return code


def tpu_vm_scp(world, words, options):
    source, target = words[0], words[1]
    if ":" in source:
        return 0
    node, path = target.split(":")
    for home in homes(world, node, options["worker"]):
        shutil.copy(source, home / path)
    return 0


def storage_rsync(world, words, options):
    return 0


def homes(world, node=None, worker="all"):
    numbers = range(world["workers"]) if worker == "all" else [int(worker)]
    nodes = world["nodes"] if node is None else [node]
    return [FOLDER / "machines" / name / str(number) for name in nodes for number in numbers]


def make_machine(home):
    """A VM as it starts, with an environment that needs no packages."""
    programs = home / "llama-jax/.venv/bin"
    programs.mkdir(parents=True)
    for name, text in {
        "python": 'echo "python $*" >>~/installs',
        "llama-jax": 'echo "llama-jax $*"; [[ $1 != train ]] || exec sleep 60',
    }.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)


def stop(home):
    script = home / "llama-jax/tpu/worker.sh"
    if script.exists():
        subprocess.run(["bash", script, "stop"], env=environment(home))


def environment(home):
    return {**os.environ, "HOME": str(home), "LLAMA_JAX_STOP_S": "5", "MACHINE": home.name}


def tell(message, code):
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
