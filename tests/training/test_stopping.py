"""Signals: the first is remembered, the second ends the process at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llama_jax.training.stopping import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_remembered_and_handlers_are_put_back(number, code, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.wanted(1)
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.wanted(2)
        assert stop.exit_code == code
    assert signal.getsignal(number) is before
    assert "saving, then stopping; once more to stop at once" in capfd.readouterr().err


@pytest.mark.slow
def test_the_second_signal_ends_at_once_though_a_save_is_stuck():
    code = (
        "import time\n"
        "from llama_jax.training.stopping import StopRequest\n"
        "with StopRequest():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
