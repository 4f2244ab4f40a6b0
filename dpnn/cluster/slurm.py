"""`dpnn submit`: a batch script for Slurm, rendered, shown or handed to sbatch. Needs no MPI.

The script runs one training run in as many pieces as it takes. Some minutes before its time limit Slurm sends SIGUSR1
to the script, which passes it on; the ranks agree on a step, write a checkpoint and exit with 75; the job is queued
again and goes on there. Where a site forbids requeueing, a chain of jobs that wait for one another does the same.

What a run came to stands in the `end` line of its metrics: a launcher's code doesn't say it where a rank has died.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpnn import config
from dpnn.cluster import environment
from dpnn.cluster.site import Cluster
from dpnn.comm.launch import DPNN
from dpnn.comm.losses import LENIENT, PLUGIN
from dpnn.comm.mesh import replicas_of
from dpnn.errors import JobError, RankError, Stopped

FIRST = "DPNN_CHAIN"
"""The environment variable with, in the later jobs of a chain, the number of the first."""
HETJOB = "hetjob"
"""What stands between the options of a heterogeneous job's parts."""
_USAGE = "a job file: sbatch SCRIPT JOB [--set KEY=VALUE ...]"
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


@dataclass(frozen=True)
class Request:
    """What is asked of the batch system. Empty texts and 0: Slurm's own defaults."""

    job: str
    """The job file; empty for a script that takes it, and more of --set, as its arguments."""
    nodes: int
    ranks_per_node: int
    time: str
    """As sbatch takes it: minutes, H:MM:SS, D-H, D-H:MM:SS ..."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE, where %a stands for the number of an array's task."""
    resume: str = ""
    """A run folder to go on with."""
    cpus_per_rank: int = 0
    gpus_per_node: int = 0
    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    array: str = ""
    before_s: int = 300
    """Seconds before the time limit at which the run is told to stop."""
    options: tuple[str, ...] = ()
    """More options of sbatch."""
    survives: bool = False
    """Whether the ranks go on where one of them, or a node, dies."""

    @property
    def source(self) -> str:
        """The job file that is read; empty where that is the script's argument."""
        return str(Path(self.resume, "job.toml")) if self.resume else self.job

    @property
    def name(self) -> str:
        """Of the job, and of its run folder."""
        return Path(self.resume or self.job or "dpnn").stem

    @property
    def parts(self) -> int:
        """Of a heterogeneous job, whose last ranks lie on nodes of another kind; 1 for any other."""
        return 1 + self.options.count(HETJOB)


def checked(request: Request, cluster: Cluster, chain: int) -> Request:
    """The request, with what its job adds: servers are spread over the nodes.

    JobError where it can't work: read and checked now, not after hours in the queue.
    """
    asked = {
        "nodes": (request.nodes, 1), "ranks-per-node": (request.ranks_per_node, 1), "before": (request.before_s, 1),
        "cpus-per-rank": (request.cpus_per_rank, 0), "gpus-per-node": (request.gpus_per_node, 0), "chain": (chain, 0),
    }  # fmt: skip
    for option, (number, least) in asked.items():
        if number < least:
            raise JobError(f"--{option} {number}: {least} or more is wanted")
    limit = seconds(request.time)
    if limit <= request.before_s:
        raise JobError(
            f"--time {request.time} is no longer than the {request.before_s} s before its end at which the run is told "
            "to stop; ask for more time, or lower --before"
        )
    for text in request.overrides:
        if "%a" in text and not request.array:
            raise JobError(f"--set {text}: %a is the number of an array's task; ask for one, as in --array 0-3")
    for option, given in (("--resume", request.resume), ("--chain", chain)):
        if request.array and given:
            raise JobError(f"--array starts a run for each of its tasks: leave out {option}")
    if request.parts > 1 and not cluster.launcher.startswith("srun"):
        raise JobError(
            'a heterogeneous job (-- hetjob ...) is started by srun only: set cluster.launcher = "srun --mpi=pmix" '
            "(or pmi2) in the site file"
        )
    if cluster.environment:
        if request.parts > 1:
            raise JobError("cluster.environment: sbcast reaches one part of a heterogeneous job; use cluster.container")
        environment.check(cluster.environment)
    if not request.source:
        return request
    parallel = config.load(request.source, [text.replace("%a", "0") for text in request.overrides]).parallel
    words = cluster.launcher.split()
    if parallel.servers and words[0] == "srun" and f"--mpi={PLUGIN}" in words:
        request = replace(request, survives=True)
    if request.parts > 1:
        return request  # how many ranks the other parts have, only sbatch knows
    replicas_of(request.nodes * request.ranks_per_node, parallel.parts, parallel.servers)
    # The last ranks are the servers. Ranks that are dealt to the nodes in turn put each on another node.
    spread = parallel.servers and parallel.parts == 1 and request.nodes > 1
    return replace(request, options=("--distribution=cyclic", *request.options)) if spread else request


def seconds(time: str) -> int:
    """Of a time limit in one of sbatch's forms; JobError for any other."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise JobError(f"--time {time}: minutes, H:MM:SS, D-H, D-H:MM or D-H:MM:SS is wanted")
    days, *rest = (match[key] for key in "dabc")
    parts = [int(part) for part in rest if part is not None]
    if days is not None:  # from the hours down
        hours, minutes, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, (minutes, secs) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def script(request: Request, cluster: Cluster) -> str:
    """The batch script."""
    return "\n".join(
        [
            "#!/bin/bash",
            f"# dpnn submit: trains {request.resume or request.job or _USAGE}",
            *(f"#SBATCH {shlex.quote(option)}" for option in _options(request, cluster)),
            "",
            *(f"module load {shlex.quote(module)}" for module in cluster.modules),
            *cluster.setup,
            *_cpus(request),
            *_job(request, cluster),
            f"run={_run_folder(request, cluster)}",
            *_unless_ended(cluster),
            'if [ -e "$run/job.toml" ]; then set -- --resume "$run" "${@:2}"',
            'else set -- "$@" --set "output.dir=$run"; fi',
            *(environment.unpack(cluster.environment) if cluster.environment else []),
            "",
            "# A signal to the script goes on to the ranks, which stop at the next step with a checkpoint.",
            *_traps(cluster),
            'size=$(stat -c %s "$run/metrics.jsonl" 2>/dev/null)',
            "ended() {  # the exit code in the run's last line of its end",
            '    tail -c +$((size + 1)) "$run/metrics.jsonl" 2>/dev/null |',
            """        sed -n 's/^{"kind":"end".*"exit":\\([0-9]*\\).*/\\1/p' | tail -n 1""",
            "}",
            *_checkpoints(cluster),
            *_lenient(request),
            f'{_launcher(request, cluster)} train "$@" & pid=$!',
            *_sweep(request),
            "while wait $pid; code=$?; kill -0 $pid 2>/dev/null; do :; done  # a trap ends wait early",
            "wait $pid; again=$?; [ $again = 127 ] || code=$again",
            "end=$(ended)",
            f"[ $code != 0 ] || code={RankError.exit_code}  # srun may call that 0",
            "code=${end:-$code}",
            *(["kill $sweeper 2>/dev/null"] if request.survives else []),
            *(environment.remove() if cluster.environment else []),
            *_again(request, cluster),
            "exit $code",
            "",
        ]
    )


def submit(request: Request, cluster: Cluster, chain: int) -> list[str]:
    """Hand the script to sbatch; the numbers of the jobs, `chain` of them that wait for one another.

    JobError with sbatch's own words where it refuses.
    """
    text = script(request, cluster)
    ids: list[str] = []
    for _ in range(max(chain, 1)):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        shared = [f"--export=ALL,{FIRST}={ids[0]}"] if ids else []  # all work on the run of the first
        ids.append(_sbatch([*after, *shared], text))
    return ids


def _sbatch(options: Sequence[str], text: str) -> str:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options], input=text, capture_output=True, text=True, timeout=120, check=False
        )
    except FileNotFoundError as error:
        raise JobError(
            "no sbatch on the PATH: run `dpnn submit` on a machine of a Slurm cluster, or --dry-run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise JobError("sbatch didn't answer for 120 s; try again when the cluster does") from error
    if done.returncode:
        raise JobError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _options(request: Request, cluster: Cluster) -> list[str]:
    values = {
        "job-name": request.name, "nodes": request.nodes, "ntasks-per-node": request.ranks_per_node,
        "cpus-per-task": request.cpus_per_rank, "gpus-per-node": request.gpus_per_node, "time": request.time,
        "account": request.account, "partition": request.partition, "qos": request.qos,
        "constraint": request.constraint, "array": request.array,
        "signal": f"B:USR1@{request.before_s}",
        "output": "%x-%A_%a.out" if request.array else "%x-%j.out", "open-mode": "append",
    }  # fmt: skip
    own = [f"--{key}={value}" for key, value in values.items() if value]
    again = ["--requeue" if cluster.requeue else "--no-requeue", *(["--no-kill"] if request.survives else [])]
    return [*own, *again, *cluster.sbatch, *request.options]


def _cpus(request: Request) -> list[str]:
    """Tell srun the cores of a rank; a heterogeneous job has a number for each part, and srun takes all its cores."""
    wanted = request.cpus_per_rank and request.parts == 1
    return ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if wanted else []


def _job(request: Request, cluster: Cluster) -> list[str]:
    """Set the arguments of `dpnn train`: the job file first, then what changes it; the script's own come last."""
    sets = [f"--set {_expanded(text)}" for text in request.overrides]
    if cluster.stage:
        sets.append(f'--set "data.stage={cluster.stage}"')
    if request.source:
        return [" ".join(["set --", shlex.quote(request.source), *sets, '"$@"'])]
    return [" ".join([f'set -- "${{1:?wanted is {_USAGE}}}"', *sets, '"${@:2}"'])]


def _run_folder(request: Request, cluster: Cluster) -> str:
    """The run folder, for the shell."""
    if request.resume:
        return shlex.quote(request.resume)
    number = _number(request)
    return f'"runs/$SLURM_JOB_NAME-{number if cluster.requeue else f"${{{FIRST}:-{number}}}"}"'


def _unless_ended(cluster: Cluster) -> list[str]:
    """End a later job of a chain whose run has ended, or can't go on."""
    if cluster.requeue:
        return []
    return [
        f'if [ "${{{FIRST}-}}" ]; then',
        '    code=$(cat "$run/exit" 2>/dev/null)',
        f'    case $code in {Stopped.exit_code} | {RankError.exit_code} | "") ;; *) exit "$code" ;; esac',
        "fi",
    ]


def _traps(cluster: Cluster) -> list[str]:
    if not cluster.requeue:
        return ["trap 'kill -USR1 $pid' USR1 TERM"]
    return ["cancelled=", "trap 'kill -USR1 $pid' USR1", "trap 'cancelled=1; kill -USR1 $pid' TERM"]


def _expanded(text: str) -> str:
    """An override for the shell: as it is, but for %a."""
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in text.split("%a"))


def _launcher(request: Request, cluster: Cluster) -> str:
    """The beginning of the line that starts the ranks."""
    # A script that is passed on doesn't know where dpnn lies.
    found = cluster.setup or cluster.modules or cluster.container or not request.source
    python = environment.PYTHON if cluster.environment else shlex.quote(sys.executable)
    dpnn = "dpnn" if found and not cluster.environment else " ".join([python, *DPNN])
    if cluster.launcher == "mpirun":
        return f'{dpnn} launch -n "$SLURM_NTASKS"'
    # Ranks aren't bound to a core: dpnn gives each its share of the node's.
    gpus = " --gpu-bind=none" if request.gpus_per_node else ""
    parts = f" --het-group=0-{request.parts - 1}" if request.parts > 1 else ""
    strict = "" if request.survives else " --kill-on-bad-exit=1"
    srun = f"{cluster.launcher}{parts} --cpu-bind=none{gpus}{strict}"
    return " ".join(filter(None, (srun, cluster.container, dpnn)))


def _lenient(request: Request) -> list[str]:
    """Make srun leave the others alone where a rank or a node dies."""
    settings = " ".join(f"{name}={value}" for name, value in LENIENT.items())
    return [f"export {settings}  # the others go on where a rank dies"] if request.survives else []


def _sweep(request: Request) -> list[str]:
    """End srun where it doesn't end with the run."""
    if not request.survives:
        return []
    return [
        "# srun waits for nodes that are gone: soon after the end that the run tells of, it is ended.",
        'until [ "$(ended)" ]; do sleep 2; done && sleep 10 && kill -9 $pid & sweeper=$!',
    ]


def _checkpoints(cluster: Cluster) -> list[str]:
    """Note where the run stands, to see whether it has got on."""
    if not cluster.requeue:
        return []
    return ['newest() { ls "$run/checkpoints" 2>/dev/null | tail -n 1; }', "before=$(newest)"]


def _again(request: Request, cluster: Cluster) -> list[str]:
    if not cluster.requeue:
        return ['echo $code 2>/dev/null > "$run/exit"  # for the later jobs of the chain']
    return [
        "",
        "# Queued again, unless somebody cancelled it: a run that has stopped with a checkpoint, and one that a rank's",
        "# death has ended, if it made a checkpoint before, so that it gets on.",
        f"again=$((code == {Stopped.exit_code}))",
        f'[ "${{end:-{RankError.exit_code}}}" != {RankError.exit_code} ] || [ "$(newest)" = "$before" ] || again=1',
        'if [ $again = 1 ] && [ ! "$cancelled" ]; then',
        f'    scontrol requeue "{_number(request)}" ||',
        '        echo "dpnn: not queued again; go on with: dpnn submit --resume $run ..." >&2',
        "fi",
    ]


def _number(request: Request) -> str:
    """The job's own number, as the script's shell knows it."""
    return "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if request.array else "$SLURM_JOB_ID"
