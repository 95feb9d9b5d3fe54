"""The report: what it says, that it escapes, and, in headless Chromium, that it works and runs nothing hostile."""

import base64
import copy
import gzip
import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report_inputs as inputs
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tau2_charts
import tau2_report
from evaluate_tau2 import main as evaluate
from tau2_compare import compare
from tau2_report import main
from tau2_users import SCRIPTED_VERSION

CSS = (tau2_report.FOLDER / "report.css").read_text(encoding="utf-8")
HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "javascript:window.pwned=1",
    "\"'><svg onload=window.pwned=1>",
    "{{ 7*7 }}{% raw %}</style><style>*{color:red}</style>",
    "]]><!--<script>\u2028\u2029 &lt;b&gt; \x00\x1b[31m \ufffe",
)
BAD = " ".join(HOSTILE)


@pytest.fixture(scope="session")
def tasks():
    return inputs.tasks_of_each_kind(3)


@pytest.fixture(scope="session")
def runs(tasks):
    """Two evaluations of the same 9 tasks with 2 trials."""
    mixed = inputs.episodes(tasks, {"do-nothing": 0.4, "always-transfer": 0.4, "teacher": 0.2}, trials=2, seed=1)
    solved = inputs.episodes(tasks, {"teacher": 1.0}, trials=2)
    return {"sft": inputs.result(tasks, mixed), "grpo": inputs.result(tasks, solved)}


@pytest.fixture
def report(tmp_path, capsys):
    """report({name: result}, *flags) -> the HTML that the command wrote."""

    def run(results, *flags):
        paths = [inputs.save(tmp_path / f"eval_{name}.json", value) for name, value in results.items()]
        code = main([*map(str, paths), *map(str, flags), "--output", str(tmp_path / "report.html")])
        assert code == 0, capsys.readouterr().err
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    run.path = tmp_path / "report.html"
    return run


def text_of(html):
    """What a reader sees of the static part, with single spaces."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def unpacked(html):
    blocks = re.findall(r'<script type="application/json" class="block">([^<]*)</script>', html)
    return [json.loads(gzip.decompress(base64.b64decode(block))) for block in blocks]


def index_of(html):
    return json.loads(re.search(r'<script type="application/json" id="index">([^<]*)</script>', html)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Content


def test_numbers_stand_with_what_they_were_measured_with(report, runs):
    html = report({"sft": runs["sft"]})
    text, found = text_of(html), runs["sft"]
    for key in ("pass_at_1", "avg_reward", "avg_partial_score"):
        one = found["metrics"][key]
        assert f"{one['value']:.3f} {one['low']:.3f} to {one['high']:.3f}" in text, key
    hat = found["metrics"]["pass_hat_k"]["2"]
    assert f"pass^2 all of 2 trials solved {hat['value']:.3f} {hat['low']:.3f} to {hat['high']:.3f}" in text
    assert "pass@2 at least one of 2" in text and "95 % intervals" in text
    for condition in (
        f"floor {found['floor_always_transfer']:.3f}",
        f"customer: scripted version {SCRIPTED_VERSION}",
        "short prompt",
        "seed 300",
        "9 telecom test tasks",
    ):
        assert condition in text, condition
    for row in ("Checkpoint runs/local/sft/hf", f"Git commit {found['versions']['git']}", "Temperature 0"):
        assert row in text, row
    assert "mms" in text and "pass@1 by number of sub-issues" in text and "How episodes ended" in text
    assert 'id="comparison"' not in html and 'id="training"' not in html


def test_every_group_of_every_run_is_in_the_charts(report, runs):
    html = report(runs)
    for label, result in runs.items():
        for kind, group in result["by_issue_type"].items():
            name = kind.removesuffix("_issue").replace("_", " ")
            assert (
                f'aria-label="{label}, {name}: {group["pass_at_1"]:.3f} ({group["successes"]}/{group["total"]}' in html
            )
    assert html.count("<svg") == 6 and "var(--series-1)" in html and "pass@k and pass^k" in html


def test_curves_are_drawn_for_the_keys_that_the_log_has(report, runs, tmp_path):
    full = inputs.training_log(tmp_path / "grpo" / "metrics.jsonl")
    text = text_of(report(runs, "--metrics-log", full))
    titles = ("Reward", "Partial score", "Loss", "KL", "Log-prob gap, engine and trainer", "Validation reward")
    assert all(title in text for title in titles) and "max steps" in text
    lines = [{"train/loss": 3.0 - i, "train/step": i, "step": i} for i in range(3)]
    few = tmp_path / "sft" / "metrics.jsonl"
    few.parent.mkdir()
    few.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "train/loss": 0.5}]) + '{"step": 3, "tr'
    )
    text = text_of(report(runs, "--metrics-log", few))
    assert (
        "loss 2 0.5" in text and "loss 2 1" not in text and "loss 3" not in text
    )  # the last line of a step; no torn one
    assert "KL" not in text and "Validation reward" not in text


def test_a_comparison_has_its_verdict_differences_and_links(report, runs):
    html = report(runs)
    (pair,) = compare(list(runs.values()), list(runs))["pairs"]
    text = text_of(html)
    assert pair["verdict"] in text and "grpo against sft" in text
    row = f"pass@1 {pair['values']['pass_at_1'][0]:.3f} 1.000 +{pair['pass_at_1']['value']:.3f}"
    assert f"{row} +{pair['pass_at_1']['low']:.3f} to +{pair['pass_at_1']['high']:.3f} p" in text
    assert f"Better with grpo: {len(pair['flips'])} tasks" in text and "Worse with grpo: 0 tasks" in text
    ids = {episode["id"] for episode in index_of(html)["episodes"]}
    links = re.findall(r'<a href="#([^"]*)">\d/2</a>', html)
    assert len(links) == 2 * len(pair["flips"]) > 0 and set(links) <= ids


def test_three_runs_are_compared_with_their_neighbours_and_the_last_with_the_first(report, runs):
    text = text_of(report({"base": runs["sft"], **runs}))
    assert [f"{b} against {a}" in text for a, b in (("base", "sft"), ("sft", "grpo"), ("base", "grpo"))] == [True] * 3


def test_runs_without_a_task_in_common_have_no_comparison(report, runs):
    other = json.loads(json.dumps(runs["grpo"]).replace("[PERSONA:", "[PERSONA:X"))
    text = text_of(report({**runs, "grpo": other}))
    assert "sft and grpo have no task and trial in common" in text and "grpo against sft" not in text


def test_the_model_of_a_chat_agent_is_named(report, runs):
    chat = {**runs["sft"], "agent": "chat", "checkpoint": None, "agent_llm": "my-model-7b"}
    text = text_of(report({"chat": chat}))
    assert "the model “my-model-7b”" in text and "scripted agent" not in text
    assert "my-model-7b" not in text_of(report({"floor": {**chat, "agent": "always-transfer"}}))


def test_runs_with_another_customer_are_marked(report, runs):
    html = report({**runs, "grpo": {**runs["grpo"], "customer": {"kind": "llm", "model": "gpt-4.1"}}})
    differ = f"customer (scripted version {SCRIPTED_VERSION} / llm model gpt-4.1)"
    assert f"Not the same measurement: the runs differ in {differ}" in text_of(html)
    assert "Not the same measurement" not in report(runs)


def test_every_episode_is_there_with_its_messages(report, runs):
    html = report(runs)
    index, blocks = index_of(html), unpacked(html)
    assert len(index["episodes"]) == 36 == len({episode["id"] for episode in index["episodes"]})
    for episode in index["episodes"]:
        full, told = blocks[episode["block"]][episode["at"]], blocks[-1][episode["told"]]
        result = runs[index["runs"][episode["run"]]]
        task_id = index["tasks"][episode["task"]]
        one = next(s for s in result["simulations"] if (s["task_id"], s["trial"]) == (task_id, episode["trial"]))
        row = next(r for r in result["results"] if (r["task_id"], r["trial"]) == (task_id, episode["trial"]))
        assert [m.get("content") for m in full["messages"]] == [m["content"] for m in one["messages"]]
        assert full["checks"] == row["checks"] and episode["solved"] == row["solved"]
        assert told["ticket"] == next(t for t in result["tasks"] if t["id"] == task_id)["ticket"]


def test_a_result_without_intervals_or_transcripts_still_gives_a_report(report, runs):
    new = ("metrics", "simulations", "tasks", "by_sub_issues", "by_persona", "info", "timestamp")
    old = {key: value for key, value in runs["sft"].items() if key not in new}
    html = report({"sft": old})
    assert 'id="comparison"' not in html
    assert f"{old['pass_at_1']:.3f}" in text_of(html) and "by persona" not in html
    assert unpacked(html)[0][0]["messages"] is None


def test_the_same_inputs_give_the_same_bytes(report, runs):
    assert report(runs) == report(runs)


# ---------------------------------------------------------------------------------------------------------------------
# Refused inputs


@pytest.mark.parametrize(
    "content, named",
    [
        ("", "not JSON"),
        ("[]", "the file"),
        ("{}", "results"),
        ('{"results": [], "pass_at_1": 0}', "results"),
        ('{"results": [3], "pass_at_1": 0}', "results.0"),
        ('{"results": [{"task_id": "a", "solved": true}], "pass_at_1": 0}', "end_reason"),
        ('{"results": [{"task_id": "a", "solved": true, "end_reason": "x", "reward": NaN}]}', "results.0.reward"),
        (
            '{"results": [{"task_id": "a", "solved": true, "end_reason": "x", "seed": 1e999}], "pass_at_1": 0}',
            "Out of range",
        ),
        ('{"simulations": [], "tasks": [], "info": {}}', "results"),
        ("[" * 100_000, "deep"),
        ("\x80", "UTF-8"),
    ],
)
def test_what_is_no_result_is_one_line_and_exit_code_2(tmp_path, capsys, content, named):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin-1"))
    assert main([str(path), "--output", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and named in error and len(error.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_bad_flags_are_one_line_and_exit_code_2(tmp_path, capsys, runs):
    (tmp_path / "b").mkdir()
    a, b = (inputs.save(folder / "eval_a.json", runs["sft"]) for folder in (tmp_path, tmp_path / "b"))
    (tmp_path / "bad.jsonl").write_text("{}\nnonsense\n")
    (tmp_path / "empty.jsonl").write_text("")
    out = tmp_path / "report.html"
    for flags, named in (
        ([a, b], "give --labels"),
        ([a, b, "--labels", "x"], "1 names for 2"),
        ([tmp_path / "no.json"], "No such file"),
        ([a, "--metrics-log", tmp_path / "bad.jsonl"], "metrics.jsonl"),
        ([a, "--metrics-log", tmp_path / "empty.jsonl"], "no lines"),
    ):
        assert main([*map(str, flags), "--output", str(out)]) == 2, flags
        error = capsys.readouterr().err
        assert named in error and len(error.splitlines()) == 1 and not out.exists()
    assert main([str(a), "--output", str(tmp_path / "no" / "report.html")]) == 2


@pytest.mark.usefixtures("own_signal_handler")
def test_what_the_evaluator_writes_is_read(tmp_path, capsys):
    results = [tmp_path / f"{agent}.json" for agent in ("always-transfer", "teacher")]
    for path in results:
        flags = ["--agent", path.stem, "--num-tasks", "3", "--num-trials", "2", "--redraw-ids"]
        assert evaluate([*flags, "--output-path", str(path)]) == 0
    assert main([*map(str, results), "--output", str(tmp_path / "report.html")]) == 0
    text = text_of((tmp_path / "report.html").read_text())
    assert (
        "teacher against always-transfer" in text and "ids redrawn" in text and "the scripted agent “teacher”" in text
    )


def test_the_command_as_a_user_runs_it(run_script, tmp_path, runs):
    path = inputs.save(tmp_path / "eval_sft.json", runs["sft"])
    done = run_script("examples/tau-bench/tau2_report.py", path, "--output", tmp_path / "report.html")
    assert done.returncode == 0 and "18 episodes" in done.stdout, done.stderr
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["eval_sft.json", "report.html"]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text, network, size


def hostile_result(runs):
    """A run with hostile text in every place where a model, a customer or a file name can put some."""
    result = copy.deepcopy(runs["sft"])
    task_ids = {row["task_id"]: f"[{BAD}]{row['task_id']}{BAD}" for row in result["results"]}
    for row in result["results"]:
        row |= {"task_id": task_ids[row["task_id"]], "issue_type": BAD, "end_reason": BAD, "detail": BAD}
        row["tokens"] = {BAD: 1}
        row["checks"] = {
            "action_checks": [
                {"name": BAD, "requestor": BAD, "arguments": {BAD: BAD}, "official": True, "sound": False}
            ],
            "communicate_checks": [{"info": BAD, "met": False}],
            "env_assertions": [{"func_name": BAD, "met": True}],
            "reward_basis": [BAD],
        }
    for simulation in result["simulations"]:
        simulation["task_id"] = task_ids[simulation["task_id"]]
        for message in simulation["messages"]:
            message["content"] = BAD
            for call in message.get("tool_calls") or []:
                call |= {"name": BAD, "arguments": {BAD: [BAD]}}
    for task in result["tasks"]:
        task |= {
            "id": task_ids[task["id"]],
            "ticket": BAD,
            "user_scenario": {"persona": BAD, "instructions": {BAD: BAD}},
        }
    names = {"checkpoint": BAD, "customer": {BAD: BAD}, "prompt": BAD, "domain": BAD, "versions": {BAD: BAD}}
    result |= names | {"by_issue_type": {BAD: next(iter(result["by_issue_type"].values()))}}
    result["settings"] = {"user": BAD, "prompt": BAD}
    return result


@pytest.fixture
def hostile_report(report, runs, tmp_path):
    """Two runs, so that there is a comparison: all failed, and all solved."""
    worse, better = hostile_result(runs), hostile_result(runs)
    for row in better["results"]:
        row["solved"] = True
    log = tmp_path / "log" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps({"step": 1, f"rollout/stop/{BAD}": 1.0, f"eval/{BAD.replace('/', '')}": 1.0}) + "\n")
    return report({"x": worse, "y": better}, "--labels", BAD, f"{BAD}2", "--metrics-log", log)


class Elements(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, html):
        super().__init__()
        self.names, self.attributes = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def test_hostile_text_stays_text(hostile_report, report, runs):
    page, plain = Elements(hostile_report), Elements(report(runs))
    assert set(page.names) <= set(plain.names)
    assert page.names.count("script") == 4  # the index, two blocks, and ours
    assert page.names.count("style") == 1
    assert {name for _, name, _ in page.attributes if name.startswith("on") or name in ("style", "src")} == set()
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert HOSTILE[1] in unpacked(hostile_report)[0][0]["messages"][0]["content"]
    island = re.search(r'id="index">(.*?)</script>', hostile_report, re.DOTALL)[1]
    assert not set("<>&\u2028\u2029") & set(island)


@settings(max_examples=8)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=3, unique=True))
@example(["if", "a\x00b", "\ud800", "\u2028", "00\x1f\x1f" + 3 * "\U00010000"])
def test_any_names_can_be_drawn_and_stay_text(names):
    bars = [
        {"group": n, "run": n, "series": i, "value": 0.5, "low": 0, "high": 1, "text": n} for i, n in enumerate(names)
    ]
    points = [{"x": 1, "y": 1, "name": n, "series": i, "dash": i, "text": n} for i, n in enumerate(names)]
    for svg in (tau2_charts.bars(bars, "x"), tau2_charts.rows(bars, "x"), tau2_charts.lines(points, "x")):
        elements = Elements(svg)
        assert (
            set(elements.names) <= {"svg", "g", "path", "line", "text", "tspan"}
            and ElementTree.fromstring(svg) is not None
        )
        assert not [name for _, name, _ in elements.attributes if name.startswith("on") or name in ("style", "href")]


def test_nothing_comes_from_outside_and_only_our_style_and_script_run(report, runs):
    html = report(runs)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|\bsrc=|<link|<iframe|<base", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and policy.count("sha256-") == 2
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(", html.replace(BAD, "")
    )


def large_run(result, tasks, trials, rng):
    """114 tasks of 4 trials, each dialogue of 60 messages that hardly pack."""
    found = {**result, "results": [], "simulations": [], "tasks": []}
    row, task = result["results"][0], result["tasks"][0]
    for number in range(tasks):
        task_id = f"[mms_issue]fault_{number}|{rng.getrandbits(64):x}[PERSONA:None]"
        found["tasks"].append({**task, "id": task_id})
        for trial in range(trials):
            said = [{"role": rng.choice(["user", "assistant"]), "content": rng.randbytes(64).hex()} for _ in range(60)]
            found["results"].append({**row, "task_id": task_id, "trial": trial, "solved": rng.random() < 0.5})
            found["simulations"].append({"task_id": task_id, "trial": trial, "messages": said})
    return found


@pytest.fixture(scope="module")
def large_report(runs, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("large"), random.Random(0)
    files = [inputs.save(folder / f"{n}.json", large_run(runs["sft"], 114, 4, rng)) for n in ("base", "sft", "grpo")]
    assert main([*map(str, files), "--output", str(folder / "report.html")]) == 0
    return folder / "report.html"


def test_three_runs_of_the_whole_base_split_stay_small(large_report):
    assert len(index_of(large_report.read_text())["episodes"]) == 1368
    assert large_report.stat().st_size < 15e6


# ---------------------------------------------------------------------------------------------------------------------
# Contrast


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    """WCAG 2's contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_charts_can_be_told_from_their_background(theme):
    found = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", CSS)
    color = {name: pair[theme] for name, *pair in found}
    for text in ("ink", "muted", "link", "good", "bad"):
        for background in ("paper", "panel", "agent", "customer"):
            assert contrast(color[text], color[background]) >= 4.5, (text, background)
    series = [name for name in color if name.startswith("series")]
    assert len(series) == 6 and all(contrast(color[name], color["paper"]) >= 3 for name in series)


# ---------------------------------------------------------------------------------------------------------------------
# In the browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
).split()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One headless browser for this file's tests, with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(20)
    yield browser
    browser.quit()


class Page:
    """A report in the browser."""

    def __init__(self, browser, path: Path, fragment=""):
        self.browser = browser
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(f"{path.as_uri()}{fragment}")
        if fragment:
            self.wait("document.querySelector('#episode .chat')")

    def __call__(self, script, *arguments):
        return self.browser.execute_script(f"return {script}", *arguments)

    def wait(self, condition):
        script = f"""const done = arguments[arguments.length - 1];
            (function look() {{ if ({condition}) done(true); else setTimeout(look, 10); }})();"""
        return self.browser.execute_async_script(script)

    def open(self, episode_id):
        self("location.hash = arguments[0]", episode_id)
        self.wait(f"document.querySelector('#list [aria-current]')?.hash === '#{episode_id}'")

    def filter(self, name, value):
        script = "const e = document.querySelector(`#filters [name=${arguments[0]}]`); e.value = arguments[1];"
        self.browser.execute_script(f"{script} e.dispatchEvent(new Event('input', {{bubbles: true}}))", name, value)
        return self("document.querySelector('#count').textContent")

    def press(self, key):
        self("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))", key)

    def text(self, selector):
        return self("document.querySelector(arguments[0]).innerText", selector)

    def complaints(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def ids(runs):
    def of(**wanted):
        found = [row for row in runs["sft"]["results"] if all(row[key] == value for key, value in wanted.items())]
        return [tau2_report.episode_id("sft", tau2_report.Row.model_validate(row)) for row in found]

    return of


def test_an_episode_opens_by_its_link_and_shows_everything(chromium, report, runs, ids):
    report(runs)
    row = next(
        r for r in runs["grpo"]["results"] if any(c["requestor"] == "user" for c in r["checks"]["action_checks"])
    )
    page = Page(chromium, report.path, "#" + tau2_report.episode_id("grpo", tau2_report.Row.model_validate(row)))
    text = page.text("#episode")
    simulation = next(
        s for s in runs["grpo"]["simulations"] if (s["task_id"], s["trial"]) == (row["task_id"], row["trial"])
    )
    for message in simulation["messages"]:
        if message["content"] and message["role"] != "tool":
            assert message["content"] in text
        for call in message.get("tool_calls") or []:
            assert call["name"] in text and all(str(value) in text for value in call["arguments"].values())
    calls = [c for m in simulation["messages"] for c in m.get("tool_calls") or []]
    for side, kind in (("user", "customer"), ("assistant", "agent")):
        assert page("document.querySelectorAll(`.call.${arguments[0]}`).length", kind) == sum(
            call["requestor"] == side for call in calls
        )
    assert "On the customer’s phone" in text and "Agent’s tool" in text and "✓ met" in text and "✓ Solved" in text
    assert "ended by user stop" in text and row["task_id"] in text and "210 generated" in text
    assert page("document.querySelector('#list [aria-current]').hash") == page("location.hash")
    assert page.complaints() == []


def test_a_failed_episode_says_what_was_not_met(chromium, report, runs, ids):
    report(runs)
    page = Page(chromium, report.path, "#" + ids(solved=False)[0])
    assert "✗ Failed" in page.text("#episode") and "✗ not met" in page.text("#episode .checks")


def test_filters(chromium, report, runs):
    report(runs)
    page = Page(chromium, report.path)
    rows = runs["sft"]["results"]
    failed = [row for row in rows if not row["solved"]]
    assert page("document.querySelectorAll('#list li').length") == 36
    assert page.filter("outcome", "differs") == f"{2 * len(failed)} of 36 episodes"
    assert page.filter("outcome", "failed") == f"{len(failed)} of 36 episodes"
    mms = [row for row in failed if row["issue_type"] == "mms_issue"]
    assert page.filter("issue", "mms_issue") == f"{len(mms)} of 36 episodes"
    page.filter("outcome", ""), page.filter("issue", "")
    ended = [row for row in rows if row["end_reason"] == "transfer"]
    page.filter("run", "0")
    assert page.filter("end", "transfer") == f"{len(ended)} of 36 episodes"
    page.filter("end", "")
    fault = rows[0]["task_id"].split("]")[1].split("|")[0]
    wanted = [row for row in rows if fault in row["task_id"]]
    assert page.filter("text", f" {fault.upper()} ") == f"{len(wanted)} of 36 episodes"
    assert page.filter("text", "no such task") == "0 of 36 episodes"


def test_keys_go_through_what_the_filters_let_through(chromium, report, runs):
    report(runs)
    page = Page(chromium, report.path)
    page.filter("outcome", "failed")
    listed = page("[...document.querySelectorAll('#list a')].map((a) => a.hash)")
    page.open(listed[0][1:])
    for key, expected in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0)):
        page.press(key)
        assert page("location.hash") == listed[expected]
    page.press("Escape")
    page.wait("!document.querySelector('#reader').classList.contains('open')")
    assert page("location.hash") == "#episodes"


def test_the_theme_follows_the_system_until_the_button_is_pressed(chromium, report, runs):
    report(runs)
    page = Page(chromium, report.path)
    background = "getComputedStyle(document.body).backgroundColor"
    bar = "getComputedStyle(document.querySelector('figure [aria-roledescription=bar]')).fill"
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        seen[scheme] = page(background), page(bar)
    assert seen["light"][0] == "rgb(255, 255, 255)" and seen["light"][0] != seen["dark"][0]
    assert seen["light"][1] != seen["dark"][1] and "0, 0, 0" not in seen["light"][1]
    page("document.querySelector('#theme').click()")
    assert page.text("#theme") == "Theme: light" and (page(background), page(bar)) == seen["light"]
    page("document.querySelector('#theme').click()")
    assert page.text("#theme") == "Theme: dark" and (page(background), page(bar)) == seen["dark"]
    page("document.querySelector('#theme').click()")
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_fits_a_phone(chromium, report, runs, ids, tmp_path):
    report(runs, "--metrics-log", inputs.training_log(tmp_path / "grpo" / "metrics.jsonl"))
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        page = Page(chromium, report.path)
        assert page("document.documentElement.scrollWidth") == 390
        page.open(ids()[0])
        assert page("document.documentElement.scrollWidth") == 390
        assert not page("document.querySelector('#filters').checkVisibility()") and page.text("#episode")
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_hostile_transcript_runs_no_script(chromium, hostile_report, report):
    page = Page(chromium, report.path)
    listed = page("episodes.map((episode) => episode.id)")
    for episode_id in listed[:4]:
        page.open(episode_id)
        page("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        text = page("document.querySelector('#episode').textContent")
        assert all(part.replace("\x00", "") in text.replace("\x00", "") for part in HOSTILE)
    assert page("typeof window.pwned") == "undefined"
    assert (
        page("document.querySelectorAll('img, iframe, object, embed, [onload], [onerror], script[src]').length") == 0
    )
    assert page("[...document.links].filter((a) => !a.getAttribute('href').startsWith('#')).length") == 0
    assert page("performance.getEntriesByType('resource').length") == 0
    assert page.complaints() == []  # not even a try that the policy stopped


def test_the_policy_stops_a_script_that_got_into_the_page(chromium, report, runs):
    """The second line of defence, tried by putting into the document what escaping keeps out of it."""
    report(runs)
    page = Page(chromium, report.path)
    for markup in ("<img src=x onerror='window.pwned=1'>", "<a href='javascript:window.pwned=1'>x</a>"):
        page("document.body.insertAdjacentHTML('beforeend', arguments[0])", markup)
    page("document.links[document.links.length - 1].click()")
    chromium.execute_script(
        "const s = document.createElement('script'); s.text = 'window.pwned=1'; document.body.append(s)"
    )
    page.wait("true")
    assert page("typeof window.pwned") == "undefined"
    assert any("Content Security Policy" in message for message in page.complaints())


def test_three_runs_of_the_whole_base_split_can_be_read(chromium, large_report):
    page = Page(chromium, large_report)
    assert page.text("#count") == "1368 of 1368 episodes"
    last = page("episodes[episodes.length - 1].id")
    page.open(last)
    assert page("document.querySelectorAll('#episode .chat li').length") == 61
    assert page("unpacked.size") <= 2  # of 30: only what was opened, and the tasks
