"""The trainer: its steps against transformers, packing, freezing, reference weights, gradients that are not finite."""

import copy
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_setup import make_args, make_rollout, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from slime_local.errors import UsageError
from slime_local.model import load_model, save_hf
from slime_local.trainer import Trainer, build_optimizer

NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


def new_trainer(folder, **changes) -> Trainer:
    args = make_args(folder, **changes)
    return Trainer(args, tiny_model(folder), args.num_rollout)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one: dict, two: dict, **tolerance) -> None:
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- Against transformers and torch's own AdamW ------------------------------------------------------------------


def test_sft_steps_equal_transformers_with_adamw(folder, tmp_path):
    """Two rollouts of two optimizer steps each, decay grouping and clipping included, give transformers' weights."""
    trainer = new_trainer(
        folder,
        loss_type="sft_loss",
        calculate_per_token_loss=True,
        global_batch_size=2,
        lr_decay_style="constant",
        weight_decay=0.1,
        adam_eps=1e-3,  # keeps AdamW from turning rounding of tiny gradients into steps
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(trainer.args.adam_beta1, trainer.args.adam_beta2),
        eps=trainer.args.adam_eps,
    )
    for rollout_id in range(2):
        data = make_rollout(seed=rollout_id)
        metrics = trainer.train(rollout_id, data)
        losses = []
        for start in (0, 2):
            total, tokens = 0.0, 0
            for i in range(start, start + 2):
                ids, length = torch.tensor(data["tokens"][i]), data["response_lengths"][i]
                mask = torch.tensor(data["loss_masks"][i])
                labels = torch.full_like(ids, -100)
                labels[-length:] = torch.where(mask == 1, ids[-length:], -100)
                total = total + model(ids[None], labels=labels[None]).loss * mask.sum()
                tokens += int(mask.sum())
            (total / tokens).backward()
            losses.append((total / tokens).item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert metrics["train/loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
        assert trainer.last_steps[1]["train/step"] == 2 * rollout_id + 1
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    assert_same(dict(tiny_model(tmp_path / "hf").named_parameters()), weights(trainer), atol=1e-5, rtol=1e-4)


def test_grpo_raises_the_probability_of_rewarded_samples(folder):
    trainer = new_trainer(folder, num_rollout=20, lr_decay_style="constant")
    data = make_rollout(rewards=[1.0, -1.0, 1.0, -1.0])
    before = sample_log_probs(trainer, data)
    for rollout_id in range(10):
        metrics = trainer.train(rollout_id, data)
    after = sample_log_probs(trainer, data)
    assert after[0] > before[0] and after[2] > before[2]
    assert after[1] < before[1] and after[3] < before[3]
    assert metrics["train/ppo_kl"] == 0.0 and metrics["train/pg_clipfrac"] == 0.0  # one step a rollout is on-policy
    assert metrics["train/train_rollout_logprob_abs_diff"] > 0


def sample_log_probs(trainer, data) -> list[float]:
    from slime_local.batching import train_samples
    from slime_local.losses import response_log_probs

    with torch.no_grad():
        trainer.model.weights_changed()
        groups = [[sample] for sample in train_samples(data)]
        return [float(response_log_probs(trainer.model, group, trainer.args)[0].sum()) for group in groups]


def test_later_steps_of_a_rollout_use_log_probs_of_its_start(folder):
    trainer = new_trainer(folder, global_batch_size=2, lr_decay_style="constant")
    data = make_rollout()
    trainer.train(0, {key: value * 2 for key, value in data.items() if key != "rollout_ids"})
    kl = [step["train/ppo_kl"] for step in trainer.last_steps]
    assert len(kl) == 4
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert abs(kl[2]) > 1e-4  # the same samples again, after the policy moved


def test_groups_without_advantage_cost_no_backward_pass(folder, monkeypatch):
    """Equal rewards in a group: the same step as with the full backward pass, which only the other group makes."""
    data = make_rollout(rewards=[1.0, -1.0, 0.0, 0.0])
    full, saving = (new_trainer(folder, micro_batch_size=2, lr_decay_style="constant") for _ in range(2))
    monkeypatch.setattr(full, "_has_gradient", lambda sample: True)
    graded = []
    original = saving._loss
    monkeypatch.setattr(saving, "_loss", lambda group: graded.append(torch.is_grad_enabled()) or original(group))
    rollouts = [data, {**data, "rewards": [0.0] * 4}]  # the second moves the weights by its moments alone
    for rollout_id, rollout in enumerate(rollouts):
        expected, found = (trainer.train(rollout_id, rollout) for trainer in (full, saving))
        for name in ("train/loss", "train/entropy_loss", "train/grad_norm", "train/train_rollout_logprob_abs_diff"):
            assert found[name] == pytest.approx(expected[name], abs=1e-6), name
        assert_same(weights(full), weights(saving), atol=1e-6, rtol=1e-5)
    assert graded == [True, False, False, False]


# ---- What must not matter ----------------------------------------------------------------------------------------

PACKINGS = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 3},
    {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 1},
    {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 17},
    {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 1000},
]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    per_token=st.booleans(),
    estimator=st.sampled_from(["grpo", "gspo"]),
    shared=st.booleans(),
)
def test_packing_does_not_change_the_step(folder, seed, per_token, estimator, shared):
    """Also where one rollout consists of several samples, which may land in different forward passes."""
    ids = [0, 0, 1, 2] if shared else [0, 1, 2, 3]
    data = make_rollout(seed=seed, rollout_ids=ids)
    results = []
    for packing in PACKINGS:
        trainer = new_trainer(
            folder,
            global_batch_size=3,
            calculate_per_token_loss=per_token,
            advantage_estimator=estimator,
            entropy_coef=0.01,
            adam_eps=1e-2,
            **packing,
        )
        metrics = trainer.train(0, data)
        results.append((metrics, weights(trainer)))
    for metrics, after in results[1:]:
        assert metrics["train/loss"] == pytest.approx(results[0][0]["train/loss"], abs=1e-4)
        assert metrics["train/grad_norm"] == pytest.approx(results[0][0]["train/grad_norm"], rel=1e-3)
        assert_same(results[0][1], after, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"calculate_per_token_loss": True}, {"use_tis": True}, {"use_kl_loss": True}])
def test_a_removed_sample_contributes_nothing_but_its_place(folder, changes):
    data = make_rollout()
    data["loss_masks"][1] = [0] * data["response_lengths"][1]
    after = []
    for other in ([5], [7]):
        data["tokens"][1] = other * len(data["tokens"][1])
        data["rewards"][1] = float(other[0])
        data["rollout_log_probs"][1] = [float("nan")] * data["response_lengths"][1]
        trainer = new_trainer(folder, ref_load=str(folder), kl_loss_coef=0.1, **changes)
        assert trainer.train(0, data)["train/grad_norm"] > 0
        after.append(weights(trainer))
    assert_same(after[0], after[1], atol=0, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"loss_type": "sft_loss"}, {"entropy_coef": 0.01}, {"calculate_per_token_loss": True}]
)
def test_a_rollout_of_removed_samples_is_a_step_with_a_gradient_of_zero(folder, changes):
    """slime's: the moments decay and move the weights, weight decay applies, the schedule advances."""
    data = make_rollout()
    removed = {**data, "loss_masks": [[0] * length for length in data["response_lengths"]]}
    trainer = new_trainer(folder, weight_decay=0.1, **changes)
    trainer.train(0, data)
    before, state = weights(trainer), trainer.optimizer.state_dict()
    expected = {name: value.clone().requires_grad_() for name, value in before.items()}
    twin = build_optimizer(trainer.args, expected)
    twin.load_state_dict(copy.deepcopy(state))
    for value in expected.values():
        value.grad = torch.zeros_like(value)
    twin.step()
    rate = trainer.schedule.lr
    assert trainer.train(1, removed)["train/grad_norm"] == 0
    assert not torch.equal(before[NORM], weights(trainer)[NORM])
    assert_same({name: value.detach() for name, value in expected.items()}, weights(trainer), atol=1e-7, rtol=0)
    assert trainer.optimizer_steps == 2 and trainer.skipped_steps == 0
    assert trainer.schedule.num_samples == 8 and trainer.schedule.lr < rate


def test_rollouts_beyond_a_multiple_of_the_batch_are_left_out(folder):
    trainer = new_trainer(folder, global_batch_size=2)
    trainer.train(0, make_rollout(samples=5))
    assert len(trainer.last_steps) == 2
    with pytest.raises(UsageError, match="1 rollouts to train on, but --global-batch-size is 2"):
        trainer.train(1, make_rollout(samples=1))


# ---- Freezing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "patterns", "trained"),
    [
        ("only_train_params_name_list", [r"layers\.1\.", "final_layernorm"], lambda n: "layers.1." in n or n == NORM),
        ("freeze_params_name_list", [r"layers\.0\.", "embedding"], lambda n: "layers.1." in n or n == NORM),
    ],
)
def test_only_matching_parameters_move(folder, flag, patterns, trained):
    trainer = new_trainer(folder, **{flag: patterns}, lr_decay_style="constant")
    before = weights(trainer)
    trainer.train(0, make_rollout())
    for name, value in weights(trainer).items():
        assert torch.equal(value, before[name]) != trained(name), name
    assert all(trained(name) for name in trainer.trainable)


@pytest.mark.parametrize("patterns", [[r"linear_qkv\.bias"], [r"bias", r"layers\.1\.mlp"]])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_biases_learn_where_their_weights_are_frozen(tmp_path, patterns, products):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    args = make_args(tmp_path, only_train_params_name_list=patterns, lr_decay_style="constant")
    trainer = Trainer(args, load_model(tmp_path, torch.float32, "cpu", products), 4)
    before = weights(trainer)
    assert trainer.train(0, make_rollout())["train/grad_norm"] > 0
    assert [name for name in trainer.trainable if torch.equal(weights(trainer)[name], before[name])] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only_train_params_name_list": ["layers.9."]}, "'layers.9.' matches no parameter"),
        ({"freeze_params_name_list": ["."]}, "leaves no parameter"),
        ({"freeze_params_name_list": ["("]}, "not a regular expression"),
        ({"freeze_params_name_list": ["a"], "only_train_params_name_list": ["b"]}, "exclude each other"),
    ],
)
def test_wrong_name_lists_are_refused(folder, changes, message):
    with pytest.raises(UsageError, match=message):
        new_trainer(folder, **changes)


# ---- Reference weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [None, [r"layers\.0\.", "embedding"]])
def test_kl_is_zero_at_the_reference_and_grows_from_it(folder, frozen):
    trainer = new_trainer(
        folder,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type="k3",
        ref_load=str(folder),
        freeze_params_name_list=frozen,
        lr_decay_style="constant",
    )
    first = trainer.train(0, make_rollout())
    assert first["train/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert set(trainer.reference) == set(trainer.trainable)  # frozen weights have no second copy
    after = weights(trainer)
    assert trainer.train(1, make_rollout())["train/kl_loss"] > 1e-4
    assert not torch.equal(after[NORM], weights(trainer)[NORM])


def test_reference_of_another_folder_is_that_folders_model(folder, other_folder):
    """Also of frozen parameters that differ, and the policy's own weights come back untouched."""
    trainer = new_trainer(
        folder, use_kl_loss=True, ref_load=str(other_folder), freeze_params_name_list=["embedding"], lr=0.0
    )
    before = weights(trainer)
    data = make_rollout()
    metrics = trainer.train(0, data)
    assert_same(before, weights(trainer), atol=0, rtol=0)
    other = new_trainer(other_folder, global_batch_size=2)
    expected = other.train(0, data)["rollout/log_probs"]
    assert metrics["rollout/ref_log_probs"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_kl_loss": True, "kl_loss_coef": 0.1},
        {"kl_coef": 0.1, "advantage_estimator": "reinforce_plus_plus_baseline", "global_batch_size": 2},
        {"global_batch_size": 2, "use_dynamic_batch_size": True, "max_tokens_per_gpu": 16},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "log_probs_max_tokens_per_gpu": 99, "use_dynamic_batch_size": True},
    ],
)
def test_frozen_layers_are_run_once_a_rollout(folder, monkeypatch, changes):
    """And the steps are those of a trainer that runs them in every pass, prefixes in common or not."""
    changes = {"max_tokens_per_gpu": 32, "ref_load": str(folder), "adam_eps": 1e-3, **changes}
    data = make_rollout()
    data["tokens"] = [[3, 1, 4, *tokens] for tokens in data["tokens"]]
    after, runs = [], []
    for shares in (True, False):
        trainer = new_trainer(folder, freeze_params_name_list=[r"layers\.0\.", "embedding"], **changes)
        if not shares:
            monkeypatch.setattr(trainer, "_shares_frozen_layers", lambda: False)
        frozen = trainer.model.decoder.layers[0]
        seen, qkv = [], frozen.self_attention.qkv
        monkeypatch.setattr(
            frozen.self_attention, "qkv", lambda x, *rest, s=seen, f=qkv: (s.append(len(x)), f(x, *rest))[1]
        )
        for rollout_id in range(2):
            trainer.train(rollout_id, data)
        after.append(weights(trainer))
        runs.append(sum(seen))
    assert_same(after[1], after[0], atol=1e-6, rtol=1e-5)
    assert runs[0] <= runs[1] / 2


def test_layers_that_the_reference_has_otherwise_are_not_shared(folder, other_folder):
    frozen = {"freeze_params_name_list": [r"layers\.0\.", "embedding"]}
    trainer = new_trainer(folder, use_kl_loss=True, ref_load=str(other_folder), lr=0.0, **frozen)
    metrics = trainer.train(0, make_rollout())
    expected = new_trainer(other_folder, global_batch_size=2).train(0, make_rollout())["rollout/log_probs"]
    assert "perf/frozen_layers_time" not in metrics
    assert metrics["rollout/ref_log_probs"] == pytest.approx(expected, abs=1e-4)


def test_a_reference_is_asked_for(folder, tmp_path):
    with pytest.raises(UsageError, match="need --ref-load"):
        new_trainer(folder, use_kl_loss=True)
    with pytest.raises(UsageError, match="no checkpoint there"):
        new_trainer(folder, use_kl_loss=True, ref_load=str(tmp_path / "nothing"))


def test_rewards_kl_penalty_needs_no_kl_loss(folder, other_folder):
    changes = {"advantage_estimator": "reinforce_plus_plus_baseline", "normalize_advantages": True}
    plain = new_trainer(folder, **changes)
    penalised = new_trainer(folder, **changes, kl_coef=0.5, ref_load=str(other_folder))
    data = make_rollout()
    assert plain.train(0, data)["train/grad_norm"] != penalised.train(0, data)["train/grad_norm"]


# ---- Gradients that are not finite, missing log-probs ------------------------------------------------------------


def test_a_nan_gradient_skips_the_step_and_says_so(folder, caplog):
    trainer = new_trainer(folder, lr_decay_style="linear")
    before, rate = weights(trainer), trainer.schedule.lr
    with caplog.at_level(logging.ERROR):
        metrics = trainer.train(0, make_rollout(rewards=[1.0, float("nan"), 0.0, 0.0]))
    assert_same(before, weights(trainer), atol=0, rtol=0)
    assert metrics["train/skipped_steps"] == 1 and trainer.schedule.lr == rate
    assert "optimizer step skipped" in caplog.text
    assert trainer.train(1, make_rollout())["train/skipped_steps"] == 1
    assert not torch.equal(before[NORM], weights(trainer)[NORM])


@pytest.mark.parametrize("flag", ["use_tis", "use_rollout_logprobs"])
def test_engine_log_probs_are_asked_for(folder, flag):
    trainer = new_trainer(folder, **{flag: True})
    data = make_rollout()
    data["rollout_log_probs"][2] = None
    with pytest.raises(UsageError, match="1 of 4 samples have no rollout_log_probs"):
        trainer.train(0, data)


def test_engine_log_probs_can_be_the_old_policy(folder):
    metrics = new_trainer(folder, use_rollout_logprobs=True).train(0, make_rollout())
    assert metrics["train/ppo_kl"] != 0.0
    assert metrics["train/train_rollout_logprob_abs_diff"] >= abs(metrics["train/ppo_kl"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "value_loss"}, "value_loss"),
        ({"advantage_estimator": "ppo"}, "critic"),
        ({"eps_clip_c": 0.5}, "must be above 1"),
        ({"rollout_top_p": 0.9}, "nucleus"),
        ({"compute_advantages_and_returns": False}, "without advantages"),
    ],
)
def test_what_cannot_be_trained_is_refused(folder, changes, message):
    with pytest.raises(UsageError, match=message):
        new_trainer(folder, **changes)


def test_trained_weights_reach_the_hf_folder(folder, tmp_path):
    trainer = new_trainer(folder, lr_decay_style="constant")
    trainer.train(0, make_rollout())
    save_hf(trainer.model, tmp_path / "out", folder)
    assert_same(weights(trainer), dict(tiny_model(tmp_path / "out").named_parameters()), atol=0, rtol=0)
