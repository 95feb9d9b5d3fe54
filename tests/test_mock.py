"""Stage 1: the task files, the pool and its distance from the test tasks, bad input."""

import json
from collections import Counter

import pytest

import tau2_mock
from tau2_domains import load_split_ids, load_tasks
from tau2_errors import BadInput

SCRIPT = "examples/tau-bench/tau2_mock.py"


@pytest.fixture(scope="module")
def written(run_script, tmp_path_factory):
    """The folder that the script wrote with no flag but --local_dir."""
    folder = tmp_path_factory.mktemp("mock") / "new" / "data"
    result = run_script(SCRIPT, "--local_dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_writes_train_and_test_tasks_by_default(written):
    files = {path.name: len(read(path)) for path in written.iterdir()}
    assert files == {"telecom_train_tasks.jsonl": 74, "telecom_test_tasks.jsonl": 40}


def test_rows_hold_the_whole_task_in_tau2s_order(written):
    rows = read(written / "telecom_test_tasks.jsonl")
    tasks = load_tasks("telecom", "test")
    assert [row["index"] for row in rows] == list(range(40))
    assert [row["metadata"]["task"] for row in rows] == [task.model_dump(mode="json") for task in tasks]
    assert all(row["metadata"]["task_id"] == row["metadata"]["task"]["id"] for row in rows)
    assert {(row["metadata"]["domain"], row["metadata"]["split"]) for row in rows} == {("telecom", "test")}
    assert type(tasks[0]).model_validate(rows[0]["metadata"]["task"]) == tasks[0]


def test_the_same_bytes_every_time(written, tmp_path):
    assert tau2_mock.main(["--local_dir", str(tmp_path)]) == 0
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("domain", "split", "count"),
    [("telecom", "small", 20), ("telecom", "base", 114), ("retail", "train", 74), ("airline", "test", 20)],
)
def test_other_splits_and_domains(tmp_path, domain, split, count):
    assert tau2_mock.main(["--local_dir", str(tmp_path), "--domain", domain, "--splits", split]) == 0
    assert len(read(tmp_path / f"{domain}_{split}_tasks.jsonl")) == count


def test_pool_counts():
    assert [len(tau2_mock.load_pool(distance)) for distance in (1, 2, 3)] == [2171, 1908, 1025]


def test_pool_is_clear_of_base_and_of_near_duplicates():
    """Checked against sets of raw sub-issues, not against the module's own faults."""
    splits = load_split_ids("telecom")
    pool = [task.id for task in tau2_mock.load_pool()]
    assert not set(pool) & set(splits["base"])
    assert set(pool) <= set(splits["full"])

    def parse(task_id):
        kind, rest = task_id.split("]", 1)
        return kind, frozenset(rest.split("[PERSONA")[0].split("|"))

    tests = [parse(task_id) for task_id in splits["test"]]
    for kind, issues in map(parse, pool):
        assert min(len(issues ^ other) for other_kind, other in tests if other_kind == kind) >= 2


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("airplane_mode_on", "airplane_mode_on", 0),
        ("airplane_mode_on", "airplane_mode_on|bad_vpn", 1),
        ("user_abroad_roaming_enabled_off|bad_vpn", "user_abroad_roaming_disabled_on|bad_vpn", 1),
        ("break_app_sms_permission", "break_app_both_permissions", 1),
        ("contract_end_suspension", "overdue_bill_suspension|lock_sim_card_pin", 2),
        ("airplane_mode_on", "bad_vpn", 2),
    ],
)
def test_fault_distance(a, b, distance):
    faults = [tau2_mock.parse_faults(f"[x_issue]{issues}[PERSONA:{p}]") for issues, p in ((a, "None"), (b, "Hard"))]
    assert tau2_mock.fault_distance(*faults) == tau2_mock.fault_distance(*reversed(faults)) == distance


def test_every_telecom_task_has_one_variant_per_fault():
    """Two sub-issues of one task never fall on the same fault: nothing is lost in the grouping."""
    for task_id in load_split_ids("telecom")["full"]:
        assert len(tau2_mock.parse_faults(task_id)) == task_id.count("|") + 1


def test_tasks_near_a_test_task_are_not_trained_on_unless_they_are_official_train_tasks():
    bar, splits = tau2_mock.training_bar("telecom"), load_split_ids("telecom")
    assert {bar(task_id) for task_id in splits["train"]} == {None}
    assert {bar(task_id) for task_id in splits["test"]} == {"test task"}
    pool = {task.id for task in tau2_mock.load_pool()}
    outside = set(splits["full"]) - set(splits["base"])
    assert {task_id for task_id in outside if bar(task_id) is None} == pool
    assert {bar(task_id) for task_id in outside - pool} == {"near a test task"}
    other_persona = splits["test"][0].partition("[PERSONA")[0] + "[PERSONA:Other]"
    assert (bar(other_persona), bar("my own")) == ("near a test task", "unknown task")


@pytest.mark.parametrize("domain", ["retail", "airline"])
def test_other_domains_have_no_near_tasks(domain):
    bar, splits = tau2_mock.training_bar(domain), load_split_ids(domain)
    assert {bar(task_id) for task_id in splits["full"]} == {None, "test task"}
    assert all(bar(task_id) for task_id in splits["test"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splits", "train", "valid"], "unknown split 'valid' of domain 'telecom'; choose from: "),
        (["--domain", "telco"], "unknown domain 'telco'; choose one of: "),
        (["--domain", "retail", "--splits", "pool"], "the split 'pool' exists for the domain 'telecom' only"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, capsys, flags, message):
    assert tau2_mock.main(["--local_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_input_from_the_command_line(run_script, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "below"):
        result = run_script(SCRIPT, "--local_dir", folder)
        assert result.returncode == 2
        assert result.stderr == f"error: {file} is a file, not a folder\n"
    assert file.read_text() == "kept"
    assert run_script(SCRIPT).returncode == 2  # --local_dir is needed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; make it with: python "),
        ("", "is empty"),
        ('{"index": 0, "metadata": {"task": {"id": "x"}}}\n\n{"index"', ", line 3 is not JSON"),
        ("[1]\n", ", line 1 is not a JSON object"),
        ('{"index": 0}\n', ", row 1 holds no task"),
    ],
)
def test_read_task_rows_names_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "tasks.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput) as error:
        tau2_mock.read_task_rows(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")

    def rows():
        yield {"index": 0}
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError):
        tau2_mock.write_jsonl(path, rows())
    assert path.read_text() == "old"


def test_in_a_mix_every_batch_has_its_share_of_each_kind(tmp_path, capsys):
    flags = ["--local_dir", str(tmp_path), "--splits", "train", "--mix", "mms_issue=2", "--num-rows", "96"]
    assert tau2_mock.main(flags) == 0
    assert "96 tasks (48 mms_issue, 24 mobile_data_issue, 24 service_issue)" in capsys.readouterr().out
    rows = tau2_mock.read_jsonl(tmp_path / "telecom_train_mix_tasks.jsonl")
    assert [row["index"] for row in rows] == list(range(96))
    kinds = [row["metadata"]["task_id"].split("]")[0] for row in rows]
    assert all(Counter(kinds[n : n + 4]) == Counter(kinds[:4]) for n in range(0, 96, 4))
    service = [row["metadata"]["task_id"] for row in rows if "service" in row["metadata"]["task_id"]]
    assert len(set(service[:14])) == 14, "each once before any twice"
    assert tau2_mock.main([*flags, "--seed", "1"]) == 0
    assert tau2_mock.read_jsonl(tmp_path / "telecom_train_mix_tasks.jsonl") != rows
    assert not (tmp_path / "telecom_train_tasks.jsonl").exists()


def test_a_mix_of_what_does_not_exist_is_refused(tmp_path, capsys):
    assert tau2_mock.main(["--local_dir", str(tmp_path), "--splits", "train", "--mix", "bills=1"]) == 2
    assert "no task is of the kind 'bills'; they are: airplane_mode_on, " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--local_dir", "/proc/nowhere"], "error: cannot write in /proc/nowhere: "),
        (["--local_dir", "/proc"], "error: cannot write in /proc: "),
        (["--local_dir", "x", "--domain", "retail", "--splits", "pool"], "error: the split 'pool' exists for"),
    ],
)
def test_what_cannot_be_written_is_told_before_tau2_loads(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(tau2_mock, "load_tasks", None)
    monkeypatch.setattr(tau2_mock, "load_split_ids", {"telecom": {"train": [], "test": []}}.__getitem__)
    assert tau2_mock.main(flags) == 2
    assert capsys.readouterr().err.startswith(said)
