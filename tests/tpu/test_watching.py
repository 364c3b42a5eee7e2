"""watch.sh against a pretended cloud that takes slices away: what is restarted, when it ends."""

import pytest

# Counts its starts in the bucket, and succeeds at once.
COUNT = ["--", "bash", "-c", 'echo "$MACHINE" >>"$FAKE_CLOUD/starts"']
WORK = ["--", "bash", "-c", 'echo "$MACHINE" >>"$FAKE_CLOUD/starts"; sleep 60']


def work_until(starts):
    """A command that works on, until it has been started as often."""
    script = (
        f'echo x >>"$FAKE_CLOUD/starts"; (($(wc -l <"$FAKE_CLOUD/starts") >= {starts})) || sleep 60'
    )
    return ["--", "bash", "-c", script]


def starts(cloud):
    return (cloud.folder / "starts").read_text().split()


def test_a_slice_that_is_not_there_is_made_set_up_and_the_command_run_to_its_end(cloud):
    cloud.play(workers=2)
    done = cloud.run("watch", *COUNT)
    assert done.returncode == 0, done.stderr
    assert sorted(starts(cloud)) == ["0", "1"]
    assert "done: the command succeeded on every worker, after 0 restarts" in done.stdout
    # It is still there, and that is said.
    assert cloud.world["request"] == "ACTIVE"
    assert "Delete it with: tpu/delete.sh" in done.stderr


def test_delete_when_done_leaves_nothing_running(cloud):
    done = cloud.run("watch", "--delete-when-done", *COUNT)
    assert done.returncode == 0, done.stderr
    assert cloud.world["request"] == "ABSENT"
    assert "small is deleted" in done.stdout
    assert "Delete it with" not in done.stderr


def test_after_a_preemption_the_slice_is_made_anew_and_the_command_goes_on(cloud):
    cloud.play(workers=2, on_job_look={"3": "preempt"})
    done = cloud.run("watch", *work_until(3))
    assert done.returncode == 0, done.stderr
    assert "small is SUSPENDED; restart 1, no bound" in done.stdout
    assert cloud.count("queued-resources delete") == 1
    assert cloud.count("queued-resources create") == 2
    assert len(starts(cloud)) == 4
    order = [
        call.split()[3] for call in cloud.calls if call.split()[3] in ("create", "delete", "scp")
    ]
    assert order == ["create", "scp", "delete", "create", "scp"]


@pytest.mark.slow
def test_a_worker_that_stays_silent_counts_as_dead_and_the_slice_is_replaced(cloud):
    cloud.play(workers=2, on_job_look={"2": "small/1"})
    done = cloud.run("watch", *work_until(3))
    assert done.returncode == 0, done.stderr
    assert "1 of 2 workers answer (3 of 3 looks)" in done.stderr
    assert "a worker is dead; restart 1, no bound" in done.stdout
    assert len(starts(cloud)) == 4


@pytest.mark.slow
def test_a_request_that_is_refused_is_made_again(cloud):
    cloud.play(refuse=["ERROR: There is no more capacity in the zone", "ERROR: again"])
    done = cloud.run("watch", *COUNT)
    assert done.returncode == 0, done.stderr
    assert cloud.count("queued-resources create") == 3
    assert "not granted (ABSENT); asking again" in done.stderr


@pytest.mark.slow
def test_restarts_have_the_bound_that_is_given(cloud):
    cloud.play(on_job_look={"2": "preempt", "4": "preempt"})
    done = cloud.run("watch", "--max-restarts", "1", *WORK)
    assert done.returncode == 1
    assert "small is SUSPENDED; restart 1 of 1" in done.stdout
    assert "already restarted 1 times (--max-restarts)" in done.stderr
    assert "Delete it with: tpu/delete.sh" in done.stderr


@pytest.mark.slow
def test_a_command_that_fails_by_itself_is_stopped_everywhere_and_tried_a_few_times(cloud):
    cloud.play(workers=2)
    # The first worker fails, the second would wait for it for ever.
    script = 'echo "$MACHINE" >>"$FAKE_CLOUD/starts"; [[ $MACHINE == 0 ]] && exit 3; sleep 60'
    done = cloud.run("watch", "--max-failures", "2", "--", "bash", "-c", script)
    assert done.returncode == 1
    assert sorted(starts(cloud)) == ["0", "0", "0", "1", "1", "1"]
    assert "the command failed with code 3 (failure 2 of 2 in a row)" in done.stdout
    assert "the command failed with code 3, 3 times in a row" in done.stderr
    assert cloud.count("queued-resources delete") == 0


def test_a_job_that_runs_already_is_watched_not_started_again(cloud):
    assert cloud.run("create").returncode == 0
    assert cloud.run("setup").returncode == 0
    short = ["--", "bash", "-c", 'echo x >>"$FAKE_CLOUD/starts"; sleep 1']
    assert cloud.run("launch", *short).returncode == 0
    done = cloud.run("watch", *short, SLICE_POLL_S="1")
    assert done.returncode == 0, done.stderr
    assert starts(cloud) == ["x"]


@pytest.mark.parametrize("arguments", [[], ["--max-restarts", "some", "--", "true"]])
def test_watch_without_a_command_or_with_a_bound_that_is_no_number_is_told(cloud, arguments):
    done = cloud.run("watch", *arguments)
    assert done.returncode == 2
    assert cloud.calls == []
