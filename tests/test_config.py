"""A job file is read whole or refused with one message that names the key, the value and what is allowed."""

from pathlib import Path

import pytest

from dpnn import config
from dpnn.errors import JobError

SMALLEST = """
[data]
train = "digits"
[model]
name = "lenet"
[train]
epochs = 3
global_batch = 64
[optimizer]
lr = 1
"""

FULL = """
seed = 4294967295
[data]
train = 'a\\b "c" ü'
test = "tab\\t line\\n bell\\u0007 delete\\u007f"
lanes = 8
augment = "crop-flip"
[model]
name = "nets/mine.py:net"
classes = 5
width = 3
options = true
day = 2020-01-01
at = 2020-01-01T10:00:00Z
"a key" = [1, 2.5, {deep = ["x", {y = inf}]}, -1e-07]
[train]
steps = 100
replica_batch = 8
loss = "sigmoid"
[optimizer]
name = "sgd"
lr = 1e-3
[schedule]
name = "step"
milestones = [1, 2.5]
factor = 0.5
"""


def test_the_smallest_job_has_the_defaults():
    job = config.parse(SMALLEST)
    assert job.seed == 0
    assert job.data == config.Data(train="digits")
    assert job.train == config.Train(epochs=3, global_batch=64)
    assert job.optimizer == config.Optimizer(lr=1.0)
    assert isinstance(job.optimizer.lr, float), "a whole number where a number is wanted"
    assert (job.schedule, job.parallel) == (config.Schedule(), config.Parallel())
    assert (job.backend, job.output) == (config.Backend(), config.Output())


def test_a_job_is_frozen():
    with pytest.raises(AttributeError):
        config.parse(SMALLEST).seed = 1


@pytest.mark.parametrize("text", [SMALLEST, FULL])
def test_a_dumped_job_is_read_as_an_equal_one(text: str):
    job = config.parse(text)
    assert config.parse(job.dump()) == job


def test_a_models_own_keys_are_its_options():
    model = config.parse(FULL).model
    assert (model.name, model.classes) == ("nets/mine.py:net", 5)
    assert model.options["width"] == 3
    assert model.options["options"] is True
    assert model.options["a key"][2] == {"deep": ["x", {"y": float("inf")}]}


def test_overrides_are_toml_or_else_plain_text():
    overrides = ["train.epochs=5", "data.test=some/path=x", 'output.dir="12"', "model.depth.a = [1, 2]", "seed=7"]
    job = config.parse(SMALLEST, [*overrides, "optimizer.nesterov=true", "model.text=1\nseed = 9"])
    assert (job.train.epochs, job.data.test, job.output.dir, job.seed) == (5, "some/path=x", "12", 7)
    assert job.optimizer.nesterov is True
    assert job.model.options == {"depth": {"a": [1, 2]}, "text": "1\nseed = 9"}


def test_a_pair_is_changed_by_setting_the_other_to_0():
    job = config.parse(SMALLEST, ["train.steps=10", "train.epochs=0"])
    assert (job.train.epochs, job.train.steps) == (0, 10)


def test_adagrad_needs_no_key_of_its_own():
    optimizer = config.parse(SMALLEST, ["optimizer.name=adagrad"]).optimizer
    assert optimizer == config.Optimizer(name="adagrad", lr=1.0)


WRONG = {
    # wrong types
    "train.epochs=ten": 'train.epochs = "ten": a whole number of 1 or more is wanted',
    "train.epochs=true": "train.epochs = true: a whole number",
    "train.epochs=1.0": "train.epochs = 1.0: a whole number",
    "optimizer.lr=true": "optimizer.lr = true: a number above 0",
    "optimizer.nesterov=1": "optimizer.nesterov = 1: true or false",
    "data.test=3": "data.test = 3: text in quotes",
    "data=3": "data = 3: a table is wanted, [data]",
    "seed={a=1}": "seed = {a = 1}: a whole number",
    "schedule.milestones=[1,'a']": 'schedule.milestones = [1, "a"]: a list of numbers above 0',
    # impossible values
    "seed=4294967296": "seed = 4294967296: a whole number from 0 to 4294967295",
    "seed=-1": "seed = -1: a whole number from 0",
    "train.epochs=-1": "train.epochs = -1: a whole number of 1 or more",
    "train.epochs=0": "train.epochs is missing: train.epochs or train.steps, a whole number of 1 or more, is wanted",
    "train.steps=4": "train.epochs = 3 and train.steps = 4: exactly one of them is wanted",
    "train.replica_batch=4": "train.global_batch = 64 and train.replica_batch = 4: exactly one",
    "train.label_smoothing=1": "train.label_smoothing = 1: a number from 0 to less than 1",
    "data.train=''": 'data.train = "": text in quotes, not empty',
    "data.lanes=6": "train.global_batch = 64 can't be divided among data.lanes = 6; use a multiple of 6 (60 or 66)",
    "data.lanes=100": "use a multiple of 100 (100)",
    "data.window=-1": "data.window = -1: a whole number of 0 or more",
    "optimizer.lr=0": "optimizer.lr = 0: a number above 0",
    "optimizer.lr=nan": "optimizer.lr = nan: a number above 0",
    "optimizer.lr=inf": "optimizer.lr = inf: a number above 0",
    "optimizer.momentum=1": "optimizer.momentum = 1: a number from 0 to less than 1",
    "optimizer.clip=-1": "optimizer.clip = -1: a number of 0 or more",
    "parallel.microbatches=-1": "parallel.microbatches = -1: a whole number of 0 or more",
    "parallel.parts=0": "parallel.parts = 0: a whole number of 1 or more",
    'parallel.placement={"conv*" = "a"}': "or a table of parts by patterns of names",
    "parallel.memory_gb=-1": "parallel.memory_gb = -1: a number of 0 or more",
    "parallel.stall_abort_s=0": "parallel.stall_abort_s = 0: a number above 0",
    "output.keep=0": "output.keep = 0: a whole number of 1 or more",
    "schedule.warmup_epochs=-1": "schedule.warmup_epochs = -1: a number of 0 or more",
    # choices
    "optimizer.name=momentun": '"sgd", "momentum" or "adagrad" is wanted; did you mean "momentum"?',
    "data.location=near": 'data.location = "near": "shared" or "local" is wanted',
    "data.augment=flip": '"crop-flip" or "imagenet" is wanted; did you mean "crop-flip"?',
    "parallel.strategy=gossip": 'parallel.strategy = "gossip": "allreduce", "average" or "downpour" is wanted',
    "backend.precision=float16": 'backend.precision = "float16": "float32", "bfloat16" or "float64" is wanted',
    # keys that don't go together
    "optimizer={name='adagrad',lr=1,momentum=0.5}": 'optimizer.momentum = 0.5: it needs optimizer.name = "momentum"',
    "schedule.milestones=[1]": 'schedule.milestones = [1.0]: it needs schedule.name = "step"',
    "schedule.power=3": 'schedule.power = 3.0: it needs schedule.name = "poly"',
    "train.grains=4": "train.grains = 4: it needs train.reproducible = true",
    "parallel.every=4": 'parallel.every = 4: it needs parallel.strategy = "average"',
    "parallel.state=keep": 'parallel.state = "keep": it needs parallel.strategy = "average"',
    "schedule.name=step": "schedule.milestones is missing: a list of epochs",
    # unknown keys
    "train.epoch=2": "train.epoch = 2: there is no such key; did you mean train.epochs?",
    "train.lr=2": "train.lr = 2: there is no such key; did you mean optimizer.lr?",
    "epochs=2": "epochs = 2: there is no such key; did you mean train.epochs?",
    "trian.x=2": "trian = {x = 2}: there is no such key; did you mean train?",
    "output.zzz=1": "there is no such key; known are output.dir, output.checkpoint_every, output.keep",
    # overrides that are none
    "train.epochs": "--set train.epochs: KEY=VALUE is wanted",
    "=3": "--set =3: KEY=VALUE is wanted",
    "train.epochs.x=3": "--set train.epochs.x=3: train.epochs is a value, not a table",
}


@pytest.mark.parametrize("override", WRONG)
def test_an_error_names_the_key_the_value_and_what_is_allowed(override: str):
    with pytest.raises(JobError) as caught:
        config.parse(SMALLEST, [override], "jobs/mine.toml")
    message = str(caught.value)
    assert message.startswith("jobs/mine.toml: ")
    assert WRONG[override] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('train = "digits"', "data.train"),
        ('name = "lenet"', "model.name"),
        ("epochs = 3", "train.epochs"),
        ("global_batch = 64", "train.global_batch"),
        ("lr = 1", "optimizer.lr"),
    ],
)
def test_a_missing_key_is_named(line: str, key: str):
    with pytest.raises(JobError, match=f"{key} is missing: .* is wanted"):
        config.parse(SMALLEST.replace(line, ""))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.reproducible=true", "parallel.microbatches=2"], "each grain is a micro-batch of its own"),
        (["train.reproducible=true", "parallel.strategy=average"], 'it needs parallel.strategy = "allreduce"'),
        (["train.reproducible=true", "parallel.wire=bfloat16"], 'train.reproducible = true needs "float32"'),
        (["train.reproducible=true", "train.balance=true"], "can't be had together with train.reproducible"),
        (["train.balance=true", "train.global_batch=0", "train.replica_batch=8"], "it needs train.global_batch"),
        (["data.location=local", "train.balance=true"], "train.balance = true: data.location = .* lanes of its own"),
        (["data.location=local", "train.reproducible=true"], 'leave it out, or use data.location = "shared"'),
        (
            [
                "data.location=local",
                "parallel.strategy=downpour",
                "parallel.servers=1",
                "train.global_batch=0",
                "train.replica_batch=8",
                "train.epochs=0",
                "train.steps=9",
            ],
            "train.steps = 9: .* goes through its own shards so many times; use train.epochs",
        ),
    ],
)
def test_keys_that_exclude_one_another(overrides: list[str], said: str):
    with pytest.raises(JobError, match=said):
        config.parse(SMALLEST, overrides)


def test_milestones_rise():
    with pytest.raises(JobError, match=r"milestones = \[2.0, 1.0\]: epochs in rising order"):
        config.parse(SMALLEST, ["schedule.name=step", "schedule.milestones=[2, 1]"])


def test_label_smoothing_belongs_to_softmax():
    with pytest.raises(JobError, match=r'label_smoothing = .* needs train.loss = "softmax"'):
        config.parse(SMALLEST, ["train.loss=sigmoid", "train.label_smoothing=0.1"])


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(JobError) as caught:
        config.parse(SMALLEST, [f"train.epochs={'x' * 1000}"])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb =\n", 2), ("a = 1\na = 2\nb = 3\n", 2), ("[a]\n[a]\n", 2), ("x = [1,\n2\n", 2), ("=", 1)],
)
def test_text_that_is_not_toml_is_refused_with_file_and_line(tmp_path: Path, text: str, line: int):
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(JobError, match=f"job.toml, line {line}: this is not TOML: "):
        config.load(str(path))


def test_a_job_is_loaded_from_a_file(tmp_path: Path):
    path = tmp_path / "job.toml"
    path.write_text(FULL, encoding="utf-8")
    assert config.load(str(path), ["seed=1"]) == config.parse(FULL, ["seed=1"])


@pytest.mark.parametrize(("name", "reason"), [("missing.toml", "No such file"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str):
    with pytest.raises(JobError, match=f"{tmp_path / name} can't be read .{reason}"):
        config.load(str(tmp_path / name))


def test_a_file_that_is_not_text_is_named(tmp_path: Path):
    (tmp_path / "job.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match=r"job\.toml is not text in UTF-8"):
        config.load(str(tmp_path / "job.toml"))
