"""A job in which nothing moves says so; where that lasts, it ends with a line for every rank, whatever holds it up.

Each fault really happens, in the middle of a run that would go on for minutes.
"""

import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpnn.observe import metrics
from tests.train.runs import events, told

HERE = Path(__file__).parent
NODES = HERE / "programs" / "nodes.py"
LIMIT_S = 60
LONG = ("train.epochs=1000", "train.eval_every=0")
DOWNPOUR = (
    "parallel.strategy=downpour", "parallel.servers=1", "train.global_batch=0", "train.replica_batch=16",
    f"model.name={HERE}/networks.py:plain", "optimizer.name=sgd", "optimizer.lr=0.01",
    "output.checkpoint_every=1000",
)  # fmt: skip
SHORT = ("parallel.stall_warn_s=0.7", "parallel.stall_abort_s=3")


@pytest.fixture
def start(start_mpirun, job, watched):
    """start(ranks, fault, *settings, script=watched.py, env={}) -> (the program, its run folder)."""

    def run(ranks, fault, *settings, script=watched, env=None):
        made = job()
        words = [word for setting in (*LONG, *settings) for word in ("--set", setting)]
        env = {"FAULT": fault, **(env or {})}
        return start_mpirun(ranks, "train", made.path, *words, script=script, env=env), made.out

    return run


@pytest.fixture
def ended(start, messages):
    """ended(as `start`) -> what came out: code, the dpnn lines of stderr, the table of the post-mortem, the folder."""

    def run(*args, **how):
        program, folder = start(*args, **how)
        done = program.finish(LIMIT_S)
        program.until_gone(10)
        table = [line.strip() for line in done.stderr.splitlines() if line.startswith(("  rank", "  no word"))]
        return SimpleNamespace(
            code=done.returncode, told=messages(done.stderr), table=table, folder=folder, stderr=done.stderr
        )

    return run


def check_kept(out, ranks: int) -> None:
    """The file has a line for every rank, and nothing of what the nodes did to make it is left."""
    lines = (out.folder / "post-mortem.txt").read_text().splitlines()
    assert sorted(lines) == sorted(out.table)
    assert len(lines) == ranks
    assert not (out.folder / "last-words").exists()


def test_a_stopped_rank_is_named_before_the_job_ends_and_when_it_does(ended):
    out = ended(3, "1 4 SIGSTOP", *SHORT)
    assert out.code == 4
    *warnings, message = out.told
    assert 1 <= len(warnings) <= 3  # of the node, though two ranks wait; each after twice the time of the one before
    waits = r"dpnn: rank [02] \(.*\) has waited \d s for the sum of the BatchNorm statistics over 3 ranks: "
    where = r"epoch 1, step 5, Collected the output of .* over the replicas, since \d\d:\d\d:\d\d; "
    assert re.match(waits + where + r"rank 1 is stopped \(SIGSTOP\) \(.*\); where nothing moves for 3 s", warnings[0])
    assert re.match(r"dpnn: rank [02]: waited 3 s for the sum of the BatchNorm statistics over 3 ranks: ", message)
    stopped, *waiting = out.table
    assert re.match(r"rank 1 \(.*\) is stopped \(SIGSTOP\): .*; last seen \d\d:\d\d:\d\d$", stopped)
    for rank, line in zip((0, 2), waiting, strict=True):
        assert re.match(rf"rank {rank} \(.*\) waits for the sum of the BatchNorm .*: epoch 1, step 5, Collected ", line)
    check_kept(out, 3)
    assert (out.folder / "failure.txt").read_text().strip() == message
    stalled = events(out.folder, "stalled")
    assert len(stalled) == len(warnings)
    assert stalled[0]["rank"] in (0, 2)
    assert "step 5, Collected" in stalled[0]["instruction"]
    assert stalled[0]["whom"].startswith("the sum of")
    assert stalled[0]["seconds"] >= 0.7


def test_a_rank_alone_whose_main_thread_hangs_in_c(ended):
    """Nobody waits for it, and nobody else could end it."""
    out = ended(1, "0 4 pause", *SHORT)
    assert out.code == 4
    warning, *_, message = out.told
    assert re.match(r"dpnn: rank 0 \(.*\) hasn't moved for \d s: epoch 1, step 5, reading a batch, since", warning)
    assert message.startswith("dpnn: nothing has moved for 3 s in epoch 1, step 5, reading a batch: this rank hangs")
    assert (out.folder / "failure.txt").read_text().strip() == message
    assert [line["exit"] for line in metrics.read(out.folder / "metrics.jsonl") if line["kind"] == "end"] == [4]
    check_kept(out, 1)


@pytest.mark.soak
def test_a_rank_alone_that_hangs_with_all_of_python(ended):
    """No thread of Python's runs any more; it ends all the same, and says where it was."""
    out = ended(1, "0 4 hold", *SHORT)
    assert out.code == 1
    assert "Timeout" in out.stderr
    assert "in watched_next" in out.stderr


def test_every_node_brings_its_lines(ended):
    """Rank 3 is stopped, alone on a node: of that there is no word."""
    warned = "parallel.stall_warn_s=1"  # and again after twice that: one warning of a node says "1 s"
    out = ended(4, "3 4 SIGSTOP", *SHORT, warned, script=NODES, env={"NODES": "0 1 1 2"})
    assert out.code == 4
    lines = (out.folder / "post-mortem.txt").read_text().splitlines()
    assert [re.match(r"rank (\d) \((.*)\) waits for ", line).groups() for line in lines[:3]] == [
        ("0", "node-0"), ("1", "node-1"), ("2", "node-1"),
    ]  # fmt: skip
    assert lines[3].startswith("no word from rank 3: the node is gone")
    assert out.table[0] == lines[3]
    assert len([line for line in out.told if " has waited 1 s for " in line]) <= 2  # a node says it once
    check_kept(out, 4)


def test_a_run_that_is_merely_slow_is_warned_of_and_goes_on(ended):
    settings = ("parallel.stall_warn_s=1", "train.epochs=0", "train.steps=12")
    out = ended(2, "1 4 sleep 2", *settings, env={"PACE": "0.1"})
    assert out.code == 0
    assert re.search(r"dpnn: rank [01] \(.*\) (has waited|hasn't moved for) \d s", out.told[0])
    assert re.match(r"dpnn: rank [01] goes on after \d s: epoch \d, step \d+, ", out.told[-1])
    assert out.table == []
    assert events(out.folder, "goes_on")[0]["seconds"] >= 1
    assert not (out.folder / "post-mortem.txt").exists()


def test_ctrl_c_twice_ends_a_run_that_stalls(start):
    """The first one asks for a stop at a step that never comes, where the launcher doesn't kill at once."""
    program, folder = start(2, "1 4 sleep 1000", "parallel.stall_warn_s=1")
    program.wait_for("where nothing moves for")  # of one of the ranks: a node says it once
    for _ in range(2):
        program.signal(signal.SIGINT)
        time.sleep(0.5)
    ended = program.finish(LIMIT_S)
    assert ended.returncode != 0 or "demux engine error" in ended.stderr  # then mpirun of MPICH has lost it
    assert not {line["exit"] for line in told(folder, "end")} & {0, 75}
    program.until_gone(10)


@pytest.mark.soak
def test_sigterm_changes_nothing_for_a_run_that_stalls_where_the_launcher_does_not_kill(start):
    """It asks for a stop at a step that never comes; the limit holds."""
    program, _ = start(2, "1 4 sleep 1000", *SHORT)
    program.wait_for("where nothing moves for")  # of one of the ranks: a node says it once
    program.signal(signal.SIGTERM)
    assert program.finish(LIMIT_S).returncode not in (0, 75)
    program.until_gone(10)


def test_downpour_ends_when_a_worker_hangs(ended):
    """The others and the server don't wait for it; it ends the job by itself, and tells of them."""
    out = ended(3, "1 4 pause", *DOWNPOUR, *SHORT)
    assert out.code == 4
    assert out.told[-1].startswith("dpnn: rank 1: nothing has moved for 3 s in epoch ")
    assert [line[:6] for line in sorted(out.table)] == ["rank 0", "rank 1", "rank 2"]
    assert re.search(r"rank 1 \(.*\) works: epoch \d+, step \d+, reading a batch, since", "\n".join(out.table))
    assert re.search(r"rank 2 \(.*\) (waits for a worker to ask|works: step \d+, serving)", "\n".join(out.table))
    check_kept(out, 3)


def test_a_worker_that_asks_for_nothing_and_its_server_are_not_taken_for_stalled(ended):
    """The worker goes through its lanes for longer than the limit before it asks for anything."""
    settings = ("parallel.n_push=32", "parallel.n_fetch=32", "parallel.stall_abort_s=2.5")
    out = ended(2, "none", *DOWNPOUR, *settings, "data.lanes=2", "train.epochs=1", env={"PACE": "0.4"})
    assert out.code == 0, out.stderr
    assert out.told == []
