"""Checkpoints: exact resume, what a kill leaves behind, where a run starts, and the metrics files."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from training_setup import make_args, make_rollout, save_tiny_model, tiny_model

from slime_local import checkpoint, loop
from slime_local.errors import UsageError
from slime_local.flags import parse_args
from slime_local.sample import Sample
from slime_local.tracking import Tracker
from slime_local.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def new_trainer(folder, **changes) -> Trainer:
    args = make_args(folder, **changes)
    return Trainer(args, tiny_model(folder), args.num_rollout)


def train(trainer: Trainer, rollouts: range) -> list[float]:
    """Losses of made-up rollouts, drawn from torch's global generator as a rollout function might."""
    losses = []
    for rollout_id in rollouts:
        data = make_rollout(seed=int(torch.randint(1000, ())))
        losses.append(trainer.train(rollout_id, data)["train/loss"])
    return losses


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# ---- Resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_decay_style": "cosine", "lr_warmup_iters": 2, "global_batch_size": 2},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "freeze_params_name_list": ["embedding"]},
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(folder, tmp_path, changes):
    changes = {**changes, "save": str(tmp_path), "load": str(tmp_path), "ref_load": str(folder)}
    whole = new_trainer(folder, **changes)
    torch.manual_seed(7)
    assert whole.load() == 0
    expected = train(whole, range(4))

    first = new_trainer(folder, **changes)
    torch.manual_seed(7)
    first.load()
    begun = train(first, range(2))
    first.save(1, {"data_source": {"epoch": 0, "offset": 4, 3: [1, 2]}})
    torch.manual_seed(99)

    second = new_trainer(folder, **changes)
    assert second.load() == 2
    assert begun + train(second, range(2, 4)) == expected
    assert_equal(weights(whole), weights(second))
    assert second.loaded_extra == {"data_source": {"epoch": 0, "offset": 4, 3: [1, 2]}}


def test_every_random_generator_continues(folder, tmp_path):
    trainer = new_trainer(folder, save=str(tmp_path), load=str(tmp_path))
    trainer.save(0)
    drawn = (random.random(), numpy.random.rand(), torch.rand(()))
    trainer.load()
    assert (random.random(), numpy.random.rand(), torch.rand(())) == drawn


def test_only_trainable_parameters_have_optimizer_state(folder, tmp_path):
    trainer = new_trainer(folder, save=str(tmp_path), only_train_params_name_list=["final_layernorm"])
    train(trainer, range(1))
    trainer.save(0)
    saved = checkpoint.read_optimizer(checkpoint.Location(tmp_path, 0))
    assert set(saved) == {"decoder.final_layernorm.weight"}
    assert set(saved["decoder.final_layernorm.weight"]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("changes", "first", "moments"),
    [
        ({}, 1, True),
        ({"no_load_optim": True}, 1, False),
        ({"finetune": True}, 0, False),
        ({"start_rollout_id": 3}, 3, True),
    ],
)
def test_what_is_taken_from_a_checkpoint(folder, tmp_path, changes, first, moments):
    old = new_trainer(folder, save=str(tmp_path))
    train(old, range(1))
    old.save(0, {"data_source": 5})
    new = new_trainer(folder, load=str(tmp_path), **changes)
    assert new.load() == first
    assert_equal(weights(old), weights(new))
    assert bool(new.optimizer.state) == moments
    assert new.schedule.num_samples == (4 if moments else 0)
    assert new.loaded_extra == ({} if changes.get("finetune") else {"data_source": 5})


def test_a_checkpoint_without_optimizer_says_what_to_add(folder, tmp_path):
    old = new_trainer(folder, save=str(tmp_path), no_save_optim=True)
    train(old, range(1))
    old.save(0)
    with pytest.raises(UsageError, match="--no-load-optim"):
        new_trainer(folder, load=str(tmp_path)).load()
    assert new_trainer(folder, load=str(tmp_path), no_load_optim=True).load() == 1


def test_other_frozen_parameters_or_another_schedule_are_refused(folder, tmp_path):
    old = new_trainer(folder, save=str(tmp_path))
    train(old, range(1))
    old.save(0)
    with pytest.raises(UsageError, match="other parameters frozen"):
        new_trainer(folder, load=str(tmp_path), freeze_params_name_list=["embedding"]).load()
    with pytest.raises(UsageError, match=r"--lr = 0\.01, this command says 0\.5"):
        new_trainer(folder, load=str(tmp_path), lr=0.5).load()
    override = new_trainer(folder, load=str(tmp_path), lr=0.5, override_opt_param_scheduler=True)
    override.load()
    assert override.schedule.max_lr == 0.5
    saved = new_trainer(folder, load=str(tmp_path), lr=0.5, use_checkpoint_opt_param_scheduler=True)
    saved.load()
    assert saved.schedule.max_lr == 0.01


def test_a_constant_learning_rate_lets_a_run_be_made_longer(folder, tmp_path):
    old = new_trainer(folder, save=str(tmp_path), lr_decay_style="constant")
    train(old, range(1))
    old.save(0)
    args = make_args(folder, load=str(tmp_path), lr_decay_style="constant")
    assert Trainer(args, tiny_model(folder), num_rollout=50).load() == 1


# ---- Where a run starts ------------------------------------------------------------------------------------------


def start(folder, **changes) -> checkpoint.Start:
    return checkpoint.find_start(make_args(folder, **changes))


def test_an_empty_or_missing_load_starts_from_the_reference_then_the_model(folder, tmp_path, capsys):
    other = save_tiny_model(tmp_path / "other", seed=1)
    (tmp_path / "empty").mkdir()
    for load in (str(tmp_path / "empty"), str(tmp_path / "missing"), None):
        found = start(folder, load=load, ref_load=str(other))
        assert (found.location.path, found.resume) == (other, False)
        assert start(folder, load=load).location.path == folder
    trainer = new_trainer(folder, load=str(tmp_path / "missing"), ref_load=str(other))
    assert trainer.load() == 0
    assert_equal(weights(trainer), dict(tiny_model(other).named_parameters()))
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"no checkpoint in --load {tmp_path}/missing yet: starting with the weights of --ref-load: {other}"


def test_steps_are_chosen_by_their_flags(folder, tmp_path):
    trainer = new_trainer(folder, save=str(tmp_path))
    kept = []
    for rollout_id in range(3):
        train(trainer, range(rollout_id, rollout_id + 1))
        trainer.save(rollout_id)
        kept.append(weights(trainer))
    assert (tmp_path / checkpoint.TRACKER).read_text() == "2"
    assert checkpoint.saved_iterations(tmp_path) == [0, 1, 2]
    chosen = new_trainer(folder, load=str(tmp_path), ckpt_step=1)
    assert chosen.load() == 2
    assert_equal(kept[1], weights(chosen))
    rl = new_trainer(folder, load=str(tmp_path / "rl"), ref_load=str(tmp_path), ref_ckpt_step=0)
    assert rl.load() == 0
    assert_equal(kept[0], weights(rl))
    with pytest.raises(UsageError, match=r"no iteration 9 \(there: 0, 1, 2\); choose with --ckpt-step"):
        start(folder, load=str(tmp_path), ckpt_step=9)


def test_the_step_of_load_is_that_of_ref_load_where_it_has_none(folder, tmp_path):
    """slime's rule, for the start and for the reference; a Hugging Face folder has no steps."""
    trainer = new_trainer(folder, save=str(tmp_path))
    for rollout_id in range(3):
        trainer.save(rollout_id)
    for load in (None, str(tmp_path / "new")):
        assert start(folder, load=load, ref_load=str(tmp_path), ckpt_step=1).location.iteration == 1
    assert start(folder, ref_load=str(tmp_path), ckpt_step=1, ref_ckpt_step=0).location.iteration == 0
    assert start(folder, ref_load=str(folder), ckpt_step=1).location.iteration is None
    args = make_args(folder, load=str(tmp_path), ref_load=str(tmp_path), ckpt_step=1)
    assert checkpoint.reference_location(args).iteration == 1
    with pytest.raises(UsageError, match="--ckpt-step 1 without --load"):
        start(folder, ckpt_step=1)


def test_folders_that_are_not_meant_are_named(folder, tmp_path):
    with pytest.raises(UsageError, match=rf"give --load {tmp_path} --ckpt-step 9"):
        start(folder, load=f"{tmp_path}/iter_0000009/")
    with pytest.raises(UsageError, match=rf"give --ref-load {tmp_path} --ref-ckpt-step 9"):
        start(folder, ref_load=f"{tmp_path}/iter_0000009")
    with pytest.raises(UsageError, match=rf"--ref-load {tmp_path}: no checkpoint there"):
        start(folder, ref_load=str(tmp_path))
    with pytest.raises(UsageError, match="has no steps"):
        start(folder, load=str(folder), ckpt_step=3)
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / checkpoint.TRACKER).write_text("4")
    with pytest.raises(UsageError, match="convert_torch_dist_to_hf"):
        start(folder, load=str(tmp_path))
    (tmp_path / checkpoint.TRACKER).write_text("release")
    with pytest.raises(UsageError, match="'release', which is no iteration"):
        start(folder, load=str(tmp_path))


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    new_trainer(folder, save=str(tmp_path)).save(0)
    path = tmp_path / "iter_0000000" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["decoder.final_layernorm.weight"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"has shape \(3,\), this model's is \(16,\)"):
        new_trainer(folder, load=str(tmp_path)).load()


# ---- Interruptions -----------------------------------------------------------------------------------------------

KILLED_SAVE = """
import os, sys, torch
from slime_local import checkpoint
path, where = sys.argv[1:]
real = getattr(os, where)
def die(*args):
    if where == "replace" or str(args[0]).endswith(".tmp"):
        os._exit(9)
    return real(*args)
setattr(os, where, die)
checkpoint.write(path, 1, {"w": torch.ones(2)}, None, {"value": 1})
"""


@pytest.mark.parametrize("where", ["rename", "replace"])
@pytest.mark.parametrize("before", [[0], [0, 1]])
def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, where, before):
    """Killed when the iteration is to be put in place, and when the tracker is to name it; also over an older one."""
    for iteration in before:
        checkpoint.write(tmp_path, iteration, {"w": torch.zeros(2)}, {}, {"value": 0})
    killed = subprocess.run([sys.executable, "-c", KILLED_SAVE, str(tmp_path), where], check=False)
    assert killed.returncode == 9
    found = checkpoint.locate(tmp_path, None, "--load", "--ckpt-step")
    assert found.iteration == before[-1]
    state = checkpoint.read_state(found)
    ((_, weight),) = checkpoint.read_weights(found, ["w"], None)
    assert weight.tolist() == [float(state["value"])] * 2  # whole: weights and state of one save
    checkpoint.write(tmp_path, 1, {"w": torch.full((2,), 2.0)}, {}, {"value": 2})
    found = checkpoint.locate(tmp_path, None, "--load", "--ckpt-step")
    assert (found.iteration, checkpoint.read_state(found)["value"]) == (1, 2)
    assert {entry.name for entry in tmp_path.iterdir()} == {"iter_0000000", "iter_0000001", checkpoint.TRACKER}


def test_state_that_could_not_be_read_again_is_refused_at_once(folder, tmp_path):
    trainer = new_trainer(folder, save=str(tmp_path))
    trainer.save(0)
    with pytest.raises(UsageError, match="plain values and tensors"):
        trainer.save(1, {"source": Path("x")})
    assert checkpoint.saved_iterations(tmp_path) == [0]


def test_retain_interval_drops_the_others_but_the_newest(folder, tmp_path):
    trainer = new_trainer(folder, save=str(tmp_path), save_retain_interval=2)
    for rollout_id in range(6):
        trainer.save(rollout_id)
    assert checkpoint.saved_iterations(tmp_path) == [0, 2, 4, 5]


def test_a_retain_interval_that_comes_later_spares_what_is_there(folder, tmp_path):
    for rollout_id in (1, 3, 5):
        new_trainer(folder, save=str(tmp_path)).save(rollout_id)
    new_trainer(folder, save=str(tmp_path), save_retain_interval=4).save(7)
    assert checkpoint.saved_iterations(tmp_path) == [1, 3, 7]


# ---- Metrics -----------------------------------------------------------------------------------------------------


def test_metrics_go_beside_the_checkpoints(folder, tmp_path):
    for step in range(2):  # a second Tracker, as after a resume, goes on in the same file
        tracker = Tracker(make_args(folder, save=str(tmp_path / "run")))
        tracker.log({"train/loss": 0.5, "train/bad": float("nan"), "note": "text"}, step)
        tracker.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "train/loss": 0.5, "train/bad": None} for step in range(2)
    ]


def test_tensorboard_gets_the_same_numbers(folder, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    with pytest.raises(UsageError, match="--use-tensorboard needs --tensorboard-dir"):
        Tracker(make_args(folder, use_tensorboard=True))
    tracker = Tracker(make_args(folder, use_tensorboard=True, tensorboard_dir=str(tmp_path)))
    tracker.log({"train/loss": 0.25}, 3)
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(3, 0.25)]


def test_wandb_is_imported_only_when_asked_for_and_its_key_never_comes_from_args(folder, monkeypatch):
    Tracker(make_args(folder))
    assert "wandb" not in sys.modules
    with pytest.raises(UsageError, match="WANDB_API_KEY"):
        Tracker(make_args(folder, use_wandb=True, wandb_key="secret"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        Tracker(make_args(folder, use_wandb=True))


def an_evaluation(*_, **__):
    return {"pool": {"rewards": [1.0], "truncated": [False], "samples": [Sample(index=0)]}}


def a_log_of_its_own(*_):
    return True


@pytest.mark.parametrize("logs", [None, f"{__name__}.a_log_of_its_own"])
def test_an_evaluation_that_a_plug_in_logged_is_not_owed_by_a_resumed_run(tmp_path, logs):
    words = "--num-rollout 2 --rollout-batch-size 2 --eval-interval 1 --skip-eval-before-train --save-interval 1"
    args = parse_args([*words.split(), "--save", str(tmp_path), "--eval-prompt-data", "pool", "pool.jsonl"])
    args.eval_function_path, args.custom_eval_rollout_log_function_path = f"{__name__}.an_evaluation", logs
    run = loop.Run(args, None, None, None, Tracker(args), 2, None)
    assert loop._evaluation_is_owed(run, 1)
    loop._evaluate(run, 0)
    assert not loop._evaluation_is_owed(run, 1)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert ("eval/pool" in row) == (logs is None)
