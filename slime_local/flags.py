"""slime's command line on one machine: every flag of slime's three parsers, with slime's names, types and defaults.

`slime-flags.tsv` lists the flags of slime, Megatron and SGLang as slime registers them. The tables below say what each
means here: HONOURED flags do what they do in slime, REFUSED ones would change the result in a way that this host
cannot reproduce, and every other flag is about clusters, kernels or memory and is ignored, once, in one line.
"""

import argparse
import ast
import csv
import difflib
import json
import math
import os
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from slime_local.errors import UsageError
from slime_local.sampling import GREEDY_BELOW

FLAG_FILE = Path(__file__).with_name("slime-flags.tsv")
# The list holds at most this many characters of a flag's choices; longer ones are cut and cannot be checked.
CHOICES_WIDTH = 120

MODEL_SHAPE = {
    "--num-layers": "num_hidden_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "intermediate_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "num_key_value_heads",
    "--kv-channels": "head_dim",
    "--vocab-size": "vocab_size",
    "--norm-epsilon": "rms_norm_eps",
    "--rotary-base": "rope_theta",
    "--untie-embeddings-and-output-weights": "tie_word_embeddings",
}

HONOURED = {
    # model and checkpoints
    "--hf-checkpoint": "HF folder: weights, config and tokenizer",
    "--load": "folder of checkpoints to resume from",
    "--ckpt-step": "iteration of --load instead of the latest",
    "--ref-load": "where a new run takes its weights from, and the reference of the KL terms",
    "--ref-ckpt-step": "iteration of --ref-load",
    "--finetune": "take weights only from --load, start at rollout 0",
    "--no-load-optim": "leave the optimizer state of --load",
    "--no-load-rng": "leave the random state of --load",
    "--save": "folder for checkpoints",
    "--save-interval": "rollouts between checkpoints",
    "--save-retain-interval": "keep only the older checkpoints at multiples of it",
    "--save-hf": "HF folder for each checkpoint, with {rollout_id} in its name",
    "--no-save-optim": "leave the optimizer out of checkpoints",
    "--no-save-rng": "leave the random state out of checkpoints",
    "--only-train-params-name-list": "regexes: only parameters whose Megatron name matches are trained",
    "--freeze-params-name-list": "regexes: parameters whose Megatron name matches are frozen",
    **{flag: f"checked against the checkpoint's {key}" for flag, key in MODEL_SHAPE.items()},
    "--group-query-attention": "MODEL_ARGS: the checkpoint decides",
    "--swiglu": "MODEL_ARGS: the checkpoint decides",
    "--normalization": "MODEL_ARGS: the checkpoint decides",
    "--qk-layernorm": "MODEL_ARGS: the checkpoint decides",
    "--add-qkv-bias": "MODEL_ARGS: the checkpoint decides",
    "--disable-bias-linear": "MODEL_ARGS: the checkpoint decides",
    "--use-rotary-position-embeddings": "MODEL_ARGS: the checkpoint decides",
    "--position-embedding-type": "MODEL_ARGS: the checkpoint decides",
    "--attention-dropout": "0.0 only: there is no dropout here",
    "--hidden-dropout": "0.0 only: there is no dropout here",
    # data
    "--prompt-data": "JSONL or parquet rows, or path@[a:b] for some of them",
    "--input-key": "row key of the prompt",
    "--label-key": "row key of the label",
    "--metadata-key": "row key of the metadata",
    "--tool-key": "row key of the tools",
    "--apply-chat-template": "render message lists with the tokenizer's template",
    "--apply-chat-template-kwargs": "JSON: arguments of the template",
    "--rollout-shuffle": "shuffle the rows, anew each epoch",
    "--rollout-seed": "seed of shuffling and sampling",
    "--disable-rollout-global-dataset": "the data source gives empty prompts",
    "--data-source-path": "class of the data source",
    "--rollout-max-prompt-len": "drop longer prompts (tokens)",
    # rollout
    "--num-rollout": "rollouts to run",
    "--num-epoch": "passes over the data, where --num-rollout is not given",
    "--start-rollout-id": "first rollout, instead of the checkpoint's next one",
    "--rollout-batch-size": "prompts in a rollout",
    "--n-samples-per-prompt": "samples in a group",
    "--over-sampling-batch-size": "prompts asked for at a time",
    "--rollout-function-path": "function that makes a rollout",
    "--custom-generate-function-path": "coroutine that makes one sample",
    "--custom-rm-path": "coroutine that rewards one sample (a group with --group-rm)",
    "--group-rm": "reward whole groups",
    "--reward-key": "key of the reward where it is a dict",
    "--custom-reward-post-process-path": "function that turns rewards into training rewards",
    "--custom-convert-samples-to-train-data-path": "function that turns samples into training data",
    "--dynamic-sampling-filter-path": "function that says whether a group is kept",
    "--rollout-sample-filter-path": "function that marks samples to leave out of the loss",
    "--rollout-all-samples-process-path": "function that sees all groups, the dropped ones too",
    "--rollout-sample-hook-path": "function called on each sample after generation",
    "--rollout-temperature": "sampling temperature, also of the trainer's log-probs",
    "--rollout-top-p": "nucleus sampling",
    "--rollout-top-k": "top-k sampling, -1 for all",
    "--rollout-max-response-len": "tokens in a response",
    "--rollout-max-context-len": "tokens in prompt and response together",
    "--rollout-stop": "stop strings",
    "--rollout-stop-token-ids": "stop tokens",
    "--rollout-skip-special-tokens": "leave special tokens out of the response's text",
    "--sglang-server-concurrency": "samples generated at a time",
    "--sglang-max-running-requests": "requests that the engine decodes at a time",
    "--sglang-context-length": "longest context of the engine (tokens)",
    "--sglang-router-ip": "address of the /generate server",
    "--sglang-router-port": "port of the /generate server",
    "--sglang-enable-deterministic-inference": "slime's own sampling seeds: one for each place in the group",
    "--loss-mask-type": "how SFT renders and masks a dialogue",
    "--custom-config-path": "YAML whose keys become attributes of args, for plug-ins",
    # evaluation
    "--eval-prompt-data": "name path [name path ...]",
    "--eval-config": "YAML of evaluation data sets",
    "--eval-interval": "rollouts between evaluations",
    "--eval-function-path": "function that makes an evaluation",
    "--eval-input-key": "as --input-key",
    "--eval-label-key": "as --label-key",
    "--eval-tool-key": "as --tool-key",
    "--eval-reward-key": "as --reward-key",
    "--eval-temperature": "as --rollout-temperature",
    "--eval-top-p": "as --rollout-top-p",
    "--eval-top-k": "as --rollout-top-k",
    "--eval-max-prompt-len": "as --rollout-max-prompt-len",
    "--eval-max-response-len": "as --rollout-max-response-len",
    "--eval-max-context-len": "as --rollout-max-context-len",
    "--eval-min-new-tokens": "tokens before a stop is allowed",
    "--n-samples-per-eval-prompt": "samples for each evaluation prompt",
    "--skip-eval-before-train": "no evaluation before rollout 0",
    # loss and optimizer
    "--global-batch-size": "samples in an optimizer step",
    "--num-steps-per-rollout": "optimizer steps in a rollout, in place of --global-batch-size",
    "--micro-batch-size": "samples in a forward pass",
    "--use-dynamic-batch-size": "fill forward passes up to --max-tokens-per-gpu",
    "--max-tokens-per-gpu": "tokens in a forward pass; prefixes that its samples share count once",
    "--log-probs-max-tokens-per-gpu": "the same where only log-probs are computed",
    "--loss-type": "policy_loss or sft_loss",
    "--advantage-estimator": "all but ppo",
    "--calculate-per-token-loss": "mean over tokens in place of the mean over samples",
    "--disable-compute-advantages-and-returns": "no advantages (SFT)",
    "--disable-rewards-normalization": "rewards as they are",
    "--disable-grpo-std-normalization": "subtract the group's mean only",
    "--normalize-advantages": "whiten advantages over the batch",
    "--eps-clip": "PPO clip",
    "--eps-clip-high": "upper PPO clip",
    "--eps-clip-c": "dual clip",
    "--entropy-coef": "weight of the entropy bonus",
    "--gamma": "discount",
    "--kl-coef": "weight of the KL in the reward",
    "--use-kl-loss": "KL against the reference in the loss",
    "--kl-loss-coef": "weight of that KL",
    "--kl-loss-type": "estimator of that KL",
    "--use-unbiased-kl": "importance-weighted KL",
    "--use-rollout-logprobs": "old log-probs from the engine",
    "--use-tis": "truncated importance sampling between engine and trainer",
    "--tis-clip": "its upper bound",
    "--tis-clip-low": "its lower bound",
    "--custom-tis-function-path": "function that corrects in its place",
    "--get-mismatch-metrics": "log that function's metrics",
    "--custom-pg-loss-reducer-function-path": "function that builds the reducer of the policy loss",
    "--use-opsm": "mask sequences that drifted off-policy",
    "--opsm-delta": "how far they may drift",
    "--log-probs-chunk-size": "positions that go through the vocabulary at a time",
    "--use-rollout-entropy": "entropy of the policy at the start of a rollout's training",
    "--optimizer": "adam only",
    "--lr": "learning rate",
    "--min-lr": "its lower bound",
    "--lr-decay-style": "its schedule",
    "--lr-decay-iters": "optimizer steps until it is down",
    "--lr-wsd-decay-style": "WSD: shape of the last part",
    "--lr-wsd-decay-iters": "WSD: optimizer steps in the last part",
    "--lr-warmup-fraction": "share of the steps that warms up",
    "--lr-warmup-iters": "optimizer steps that warm up",
    "--lr-warmup-init": "learning rate at the first step of it",
    "--override-opt_param-scheduler": "resume with the schedule of the flags",
    "--use-checkpoint-opt_param-scheduler": "resume with the schedule of the checkpoint",
    "--reset-optimizer-states": "forget the moments before each rollout",
    "--weight-decay": "AdamW's weight decay",
    "--weight-decay-incr-style": "its schedule",
    "--start-weight-decay": "its first value",
    "--end-weight-decay": "its last value",
    "--adam-beta1": "AdamW",
    "--adam-beta2": "AdamW",
    "--adam-eps": "AdamW",
    "--clip-grad": "largest gradient norm",
    "--seed": "seed of the trainer",
    # runs and records
    "--debug-rollout-only": "rollouts without training",
    "--debug-train-only": "training without an engine",
    "--save-debug-rollout-data": "file of each rollout's samples, with {rollout_id} in its name",
    "--load-debug-rollout-data": "train on such files",
    "--load-debug-rollout-data-subsample": "share of their samples",
    "--save-debug-train-data": "file of each rollout's training data",
    "--dump-details": "folder for both",
    "--custom-rollout-log-function-path": "function that logs a rollout; True leaves the usual log out",
    "--custom-eval-rollout-log-function-path": "the same for evaluations",
    "--log-passrate": "log pass@k",
    "--log-reward-category": "log shares by this key of the reward",
    "--use-tensorboard": "write TensorBoard events",
    "--tensorboard-dir": "where",
    "--tb-project-name": "TensorBoard project",
    "--tb-experiment-name": "TensorBoard experiment",
    "--use-wandb": "log to Weights & Biases (key from the environment)",
    "--wandb-mode": "online, offline or disabled",
    "--wandb-dir": "Weights & Biases folder",
    "--wandb-project": "Weights & Biases project",
    "--wandb-group": "Weights & Biases group",
    "--wandb-team": "Weights & Biases team",
    "--wandb-host": "Weights & Biases server",
    "--wandb-run-id": "Weights & Biases run to continue",
    "--disable-wandb-random-suffix": "run name as the group's",
    "--wandb-always-use-train-step": "count optimizer steps on the x axis of rollouts",
}

REFUSED = {
    "--buffer-filter-path": "there is no sample buffer",
    "--custom-advantage-function-path": "the trainer has its own estimators only",
    "--custom-loss-function-path": "the trainer has its own losses only",
    "--custom-megatron-before-log-prob-hook-path": "there is no Megatron",
    "--custom-megatron-before-train-step-hook-path": "there is no Megatron",
    "--custom-megatron-init-path": "there is no Megatron",
    "--custom-model-provider-path": "there is no Megatron",
    "--decoupled-lr": "schedules count optimizer steps, with one learning rate",
    "--lr-decay-samples": "schedules count optimizer steps, with one learning rate",
    "--lr-warmup-samples": "schedules count optimizer steps, with one learning rate",
    "--lr-wsd-decay-samples": "schedules count optimizer steps, with one learning rate",
    "--decrease-batch-size-if-needed": "batches are constant",
    "--enable-mtp-training": "there is no multi-token prediction",
    "--fp16": "weights are fp32 and products bf16 or fp32",
    "--keep-old-actor": "old log-probs are computed at the start of the step",
    "--load-forge-rollout-data": "use --load-debug-rollout-data",
    "--mask-offpolicy-in-partial-rollout": "there are no partial rollouts",
    "--mtp-num-layers": "there is no multi-token prediction",
    "--multi-latent-attention": "only Llama, Qwen2 and Qwen3 decoders are known",
    "--multimodal-keys": "text only",
    "--num-experts": "there is no mixture of experts",
    "--opd-type": "there is no distillation",
    "--partial-rollout": "unfinished samples are dropped at the end of a rollout",
    "--rampup-batch-size": "batches are constant",
    "--ref-update-interval": "the reference stays as it is",
    "--rm-type": "give --custom-rm-path, or set the reward in the generate function",
    "--rollout-data-postprocess-path": "it reads Megatron's rollout batches",
    "--rollout-external-engine-addrs": "the engine runs in this process",
    "--use-opd": "there is no distillation",
    "--use-rollout-routing-replay": "there is no mixture of experts",
    "--use-routing-replay": "there is no mixture of experts",
    "--use-stateless-adam": "the optimizer is AdamW",
    "--wandb-key": "the key comes from the environment: WANDB_API_KEY",
}

ALLOWED_VALUES = {
    "--advantage-estimator": {"grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"},
    "--loss-mask-type": {"qwen", "qwen3"},
    "--loss-type": {"policy_loss", "sft_loss"},
    "--optimizer": {"adam"},
    "--attention-dropout": {0.0},
    "--hidden-dropout": {0.0},
}

# The least value of a number that was given; every other number that is read has to be finite.
AT_LEAST = {
    **dict.fromkeys(
        (
            "--rollout-batch-size --n-samples-per-prompt --global-batch-size --micro-batch-size --num-epoch "
            "--num-steps-per-rollout --over-sampling-batch-size --max-tokens-per-gpu --log-probs-max-tokens-per-gpu "
            "--save-interval --save-retain-interval --eval-interval --n-samples-per-eval-prompt "
            "--rollout-max-response-len --rollout-max-context-len --rollout-max-prompt-len --eval-max-response-len "
            "--eval-max-context-len --eval-max-prompt-len --sglang-server-concurrency --sglang-max-running-requests "
            "--sglang-context-length --lr-decay-iters --lr-wsd-decay-iters"
        ).split(),
        1,
    ),
    **dict.fromkeys(
        (
            "--num-rollout --start-rollout-id --ckpt-step --ref-ckpt-step --seed --sglang-router-port --lr --min-lr "
            "--lr-warmup-iters --lr-warmup-init --lr-warmup-fraction --weight-decay --clip-grad --eps-clip "
            "--eps-clip-high --adam-beta1 --adam-beta2 --adam-eps --eval-temperature --eval-min-new-tokens"
        ).split(),
        0,
    ),
    "--rollout-top-k": -1,
    "--eval-top-k": -1,
}
AT_MOST = {
    **dict.fromkeys(("--sglang-router-port",), 65535),
    **dict.fromkeys(("--adam-beta1", "--adam-beta2", "--lr-warmup-fraction", "--rollout-top-p", "--eval-top-p"), 1),
    **dict.fromkeys(("--seed", "--rollout-seed"), 2**32 - 1),
}


@dataclass(frozen=True)
class Flag:
    """One row of slime-flags.tsv."""

    name: str
    owner: str
    dest: str
    action: str
    type: str
    nargs: str
    default: str
    choices: str
    aliases: str

    @property
    def option_strings(self) -> list[str]:
        return [self.name, *self.aliases.split()]


@cache
def load_flags() -> tuple[Flag, ...]:
    """All flags that slime knows, in the order of the file."""
    with FLAG_FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return tuple(Flag(*row) for row in rows[1:])


def parse_args(argv: list[str] | None = None, host: str = "local") -> argparse.Namespace:
    """slime's args for `argv`, with what slime derives from them.

    Besides slime's attributes: `given_flags` (in order, without repetition) and `ignored_flags`, those without meaning
    on one machine. Raises UsageError, one line for each problem, on a flag or value that slime does not know and,
    where `host` is "local", on one that this host refuses.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        raise UsageError("\n".join(_unknown(rest)))
    args.given_flags = list(args.given_flags)
    args.ignored_flags = [flag for flag in args.given_flags if flag not in HONOURED] if host == "local" else []
    _check_numbers(args)
    if host == "local":
        _refuse(args)
    derive(args, host)
    return args


def _check_numbers(args: argparse.Namespace) -> None:
    dests = {flag.name: flag.dest for flag in load_flags()}
    lines = []
    for flag in args.given_flags:
        value = getattr(args, dests[flag])
        if flag not in HONOURED or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            lines.append(f"{flag} {value}: give a finite number")
        elif value < AT_LEAST.get(flag, value):
            lines.append(f"{flag} {value}: it must be {AT_LEAST[flag]} or more")
        elif value > AT_MOST.get(flag, value):
            lines.append(f"{flag} {value}: it must be {AT_MOST[flag]} or less")
    if lines:
        raise UsageError("\n".join(lines))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)

    def print_help(self, file: Any = None) -> None:
        print("usage: train.py [--host auto|local|slime] [--check-only] <slime's flags>\n", file=file)
        print(
            "--host: where to run; auto takes slime where it is installed. --check-only: check the command and stop."
        )
        print("slime's flags that this machine honours (the others it accepts and ignores, or refuses):\n", file=file)
        for flag, meaning in HONOURED.items():
            print(f"  {flag:<44} {meaning}", file=file)


@cache
def _parser() -> _Parser:
    parser = _Parser(prog="train.py", add_help=False, allow_abbrev=False, argument_default=None)
    parser.set_defaults(given_flags=())
    for flag in load_flags():
        _add(parser, flag)
    return parser


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    if flag.action == "Help":
        parser.add_argument(*flag.option_strings, action="help")
        return
    base, extra = _action(flag)
    default = _default(flag.default)
    parser.add_argument(*extra.pop("names"), dest=flag.dest, default=default, action=_recording(base, flag), **extra)


def _action(flag: Flag) -> tuple[type[argparse.Action], dict[str, Any]]:
    """The argparse action of a row, and the arguments that it takes besides dest and default."""
    names = flag.option_strings
    match flag.action:
        case "StoreTrue" | "DeprecatedStoreTrue" | "DeprecatedStoreConst" | "Deprecated":
            return argparse._StoreTrueAction, {"names": names}
        case "StoreFalse":
            return argparse._StoreFalseAction, {"names": names}
        case "BooleanOptional":
            return argparse.BooleanOptionalAction, {"names": [name for name in names if not name.startswith("--no-")]}
        case "Append":
            return argparse._AppendAction, {"names": names, **_value_arguments(flag)}
        case _:
            return argparse._StoreAction, {"names": names, **_value_arguments(flag)}


def _value_arguments(flag: Flag) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    convert = _converter(flag.type)
    if convert is not None:
        arguments["type"] = convert
    if flag.nargs:
        arguments["nargs"] = int(flag.nargs) if flag.nargs.isdigit() else flag.nargs
    if choices := _choices(flag):
        arguments["choices"] = choices
    return arguments


def _choices(flag: Flag) -> list[Any]:
    """What can be chosen; nothing where everything can, or where the list does not hold them all."""
    if not flag.choices or len(flag.choices) >= CHOICES_WIDTH or flag.type == "enum_type_handler":
        return []
    convert = _converter(flag.type)
    return [convert(choice) if convert else choice for choice in flag.choices.split("|")]


def _recording(base: type[argparse.Action], flag: Flag) -> type[argparse.Action]:
    """`base`, which also notes that the flag was given."""

    class Recording(base):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            if flag.name not in namespace.given_flags:
                namespace.given_flags = (*namespace.given_flags, flag.name)
            super().__call__(parser, namespace, values, option_string)

    return Recording


def _converter(name: str) -> Any:
    """The callable for a type name. The rare types belong to flags that are ignored: their text is kept."""
    known = {"int": int, "float": float, "str": str, "bool": bool, "loads": _json, "json_list_type": _json}
    return {**known, "human_readable_int": _human_int, "nullable_str": _nullable}.get(name)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text[:80]!r} ({error})") from error


def _human_int(text: str) -> int:
    """ "32k" is 32,000 and "32K" is 32,768, as SGLang reads them."""
    factors = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    try:
        return int(float(text[:-1]) * factors[text[-1]]) if text[-1:] in factors else int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from error


def _nullable(text: str) -> str | None:
    return None if text in ("", "None", "null") else text


def _default(text: str) -> Any:
    if text == "'==SUPPRESS=='":
        return argparse.SUPPRESS
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _unknown(rest: list[str]) -> list[str]:
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    known = [name for flag in load_flags() for name in flag.option_strings]
    if not flags:
        return [f"{rest[0]!r} belongs to no flag (a value too many before it?)"]
    lines = []
    for flag in dict.fromkeys(flags):
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        lines.append(f"{flag} is not a flag of slime{hint}")
    return lines


def _refuse(args: argparse.Namespace) -> None:
    dests = {flag.name: flag.dest for flag in load_flags()}
    lines = [_refusal(flag, getattr(args, dests[flag])) for flag in args.given_flags]
    if any(lines):
        raise UsageError("\n".join(filter(None, lines)))


def _refusal(flag: str, value: Any) -> str | None:
    """Why this host refuses this value of a flag."""
    if flag in REFUSED:
        return f"{flag} works under slime only (--host slime): here {REFUSED[flag]}"
    if flag in ALLOWED_VALUES and value not in ALLOWED_VALUES[flag]:
        allowed = ", ".join(map(str, sorted(ALLOWED_VALUES[flag])))
        return f"{flag} {value} works under slime only (--host slime): here it can be {allowed}"
    return None


def derive(args: argparse.Namespace, host: str = "local") -> None:
    """Set in place what slime computes from its args, in slime's order. Raises UsageError where slime refuses, and
    where this host (`host` "local") refuses what --custom-config-path sets."""
    args.eval_datasets = eval_datasets(args)
    _derive_run(args)
    _derive_batches(args)
    _apply_custom_config(args, host)
    _derive_lengths(args)


def _derive_run(args: argparse.Namespace) -> None:
    args.rank, args.world_size = 0, args.actor_num_nodes * args.actor_num_gpus_per_node
    args.use_critic = args.advantage_estimator == "ppo"
    if args.eps_clip_high is None:
        args.eps_clip_high = args.eps_clip
    if args.eval_reward_key is None:
        args.eval_reward_key = args.reward_key
    if args.eval_function_path is None:
        args.eval_function_path = args.rollout_function_path
    if args.dump_details is not None:
        args.save_debug_rollout_data = f"{args.dump_details}/rollout_data/{{rollout_id}}.pt"
        args.save_debug_train_data = f"{args.dump_details}/train_data/{{rollout_id}}.pt"
    if args.load_debug_rollout_data is not None:
        args.debug_train_only = True


def _derive_batches(args: argparse.Namespace) -> None:
    if args.rollout_batch_size is None:
        raise UsageError("--rollout-batch-size is missing: how many prompts make a rollout")
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    if args.num_steps_per_rollout is not None:
        derived = samples // args.num_steps_per_rollout
        if args.global_batch_size not in (None, derived):
            raise UsageError(
                f"--global-batch-size {args.global_batch_size} contradicts --num-steps-per-rollout "
                f"{args.num_steps_per_rollout}, which makes it {samples} // {args.num_steps_per_rollout} = {derived}"
            )
        args.global_batch_size = derived
    if args.global_batch_size is None:
        args.global_batch_size = args.micro_batch_size  # Megatron's rule with one data-parallel rank
    if args.n_samples_per_prompt == 1:
        args.grpo_std_normalization = False
    if args.over_sampling_batch_size is None:
        args.over_sampling_batch_size = args.rollout_batch_size
    if args.use_dynamic_batch_size and args.log_probs_max_tokens_per_gpu is None:
        args.log_probs_max_tokens_per_gpu = args.max_tokens_per_gpu


def _apply_custom_config(args: argparse.Namespace, host: str) -> None:
    """Every key of the --custom-config-path YAML becomes an attribute of args, over whatever it was. One that is a
    flag's is held against what can be given on the command line."""
    if not args.custom_config_path:
        return
    flags = {flag.dest: flag for flag in load_flags()}
    values = _read_yaml("--custom-config-path", args.custom_config_path)
    lines = [_wrong_value(flags[key], value, host) for key, value in values.items() if key in flags]
    if any(lines):
        where = f"--custom-config-path {args.custom_config_path}"
        raise UsageError("\n".join(f"{where}: {line}" for line in lines if line))
    for key, value in values.items():
        setattr(args, key, value)


def doubtful_config_keys(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(key, flag) of each key of the --custom-config-path YAML that is nearly a flag's name and none: a mistake, or a
    plug-in's own key."""
    if not args.custom_config_path:
        return []
    known = {flag.dest for flag in load_flags()}
    unknown = [key for key in _read_yaml("--custom-config-path", args.custom_config_path) if key not in known]
    near = [(key, difflib.get_close_matches(key, known, n=1, cutoff=0.85)) for key in unknown]
    return [(key, found[0]) for key, found in near if found]


def _wrong_value(flag: Flag, value: Any, host: str) -> str | None:
    """What is wrong with a YAML's value for a flag, in the words of the command line."""
    if flag.name in HONOURED and not _fits(flag, value):
        return f"{flag.dest} {str(value)[:40]!r} is no value of {flag.name}"
    default = _default(flag.default)
    if host == "local" and not (flag.name in REFUSED and value == default) and (why := _refusal(flag.name, value)):
        return why
    choices = _choices(flag)
    wrong = [one for one in (value if flag.nargs and isinstance(value, list) else [value]) if one not in choices]
    if choices and wrong and value != default:
        known = ", ".join(map(repr, choices))
        return f"argument {flag.name}: invalid choice: {str(wrong[0])[:40]!r} (choose from {known})"
    return None


def _fits(flag: Flag, value: Any) -> bool:
    """Whether a YAML's value has the type that the flag's own values have."""
    if value is None:
        return flag.default == "None"
    if flag.nargs:
        return isinstance(value, list)
    if "Store" in flag.action and flag.action != "Store":
        return isinstance(value, bool)
    least, most = AT_LEAST.get(flag.name, -math.inf), AT_MOST.get(flag.name, math.inf)
    kinds = {"int": int, "float": int | float, "str": str, "": str}
    fits = isinstance(value, kinds.get(flag.type, object)) and not (isinstance(value, bool) and flag.type != "bool")
    return fits and (isinstance(value, str) or not isinstance(value, int | float) or least <= value <= most)


def _derive_lengths(args: argparse.Namespace) -> None:
    if args.eval_max_context_len is None:
        args.eval_max_context_len = args.rollout_max_context_len
    if args.rollout_max_context_len is not None and args.rollout_max_prompt_len is None:
        args.rollout_max_prompt_len = args.rollout_max_context_len - 1  # room for one token under the loss


def check_combinations(args: argparse.Namespace) -> None:
    """Raise UsageError, one line for each rule of slime and Megatron that the flags break together."""
    rules = [
        (
            args.rollout_temperature < GREEDY_BELOW,
            f"--rollout-temperature must be above 0 ({GREEDY_BELOW} or more): greedy decoding is not a policy",
        ),
        (args.num_rollout is None and args.num_epoch is None, "give --num-rollout or --num-epoch"),
        (
            args.num_rollout is None and not args.rollout_global_dataset,
            "--num-epoch counts passes over the data: remove --disable-rollout-global-dataset",
        ),
        (
            args.eval_interval is not None and not args.eval_datasets,
            "--eval-interval without data: add --eval-prompt-data NAME PATH",
        ),
        (args.save_interval is not None and args.save is None, "--save-interval without --save: say where to save"),
        (
            args.save is not None and args.save_interval is None,
            "--save without --save-interval: say how often to save",
        ),
        (args.kl_coef != 0 and args.kl_loss_coef != 0, "--kl-coef and --kl-loss-coef exclude each other"),
        (
            args.advantage_estimator.startswith("reinforce_plus_plus") and not args.normalize_advantages,
            f"--advantage-estimator {args.advantage_estimator} needs --normalize-advantages",
        ),
        (args.use_rollout_logprobs and args.use_tis, "--use-rollout-logprobs and --use-tis exclude each other"),
        (
            args.use_dynamic_batch_size and args.max_tokens_per_gpu is None,
            "--use-dynamic-batch-size needs --max-tokens-per-gpu",
        ),
        (
            args.save_debug_train_data is not None and args.save_debug_train_data == args.save_debug_rollout_data,
            "--save-debug-train-data and --save-debug-rollout-data name the same file",
        ),
        (
            args.debug_rollout_only and args.debug_train_only,
            "--debug-rollout-only and --debug-train-only exclude each other",
        ),
        (
            args.over_sampling_batch_size < args.rollout_batch_size,
            f"--over-sampling-batch-size {args.over_sampling_batch_size} is below --rollout-batch-size "
            f"{args.rollout_batch_size}",
        ),
        (
            args.rollout_max_context_len is not None
            and (args.rollout_max_prompt_len or 0) > args.rollout_max_context_len - 1,
            "--rollout-max-prompt-len must be below --rollout-max-context-len",
        ),
        (
            bool(args.only_train_params_name_list and args.freeze_params_name_list),
            "--only-train-params-name-list and --freeze-params-name-list exclude each other",
        ),
        (
            (args.kl_coef != 0 or args.use_kl_loss) and args.ref_load is None,
            "--use-kl-loss and --kl-coef need a reference: add --ref-load",
        ),
        (
            args.get_mismatch_metrics and args.custom_tis_function_path is None,
            "--get-mismatch-metrics needs --custom-tis-function-path",
        ),
    ]
    lines = [message for broken, message in rules if broken]
    if lines:
        raise UsageError("\n".join(lines))


@dataclass
class EvalDataset:
    """One evaluation data set. What is None falls back to the rollout's setting where it is used."""

    name: str
    path: str
    rm_type: str | None = None
    custom_rm_path: str | None = None
    custom_generate_function_path: str | None = None
    input_key: str | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = None
    apply_chat_template: bool | None = None
    apply_chat_template_kwargs: dict[str, Any] | None = None
    n_samples_per_eval_prompt: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_response_len: int | None = None
    min_new_tokens: int | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    metadata_overrides: dict[str, Any] = field(default_factory=dict)


# Where an evaluation setting comes from when the data set does not name it: the first attribute of args that is set.
EVAL_FALLBACKS = {
    "n_samples_per_eval_prompt": ("n_samples_per_eval_prompt", "n_samples_per_prompt"),
    "temperature": ("eval_temperature", "rollout_temperature"),
    "top_p": ("eval_top_p", "rollout_top_p"),
    "top_k": ("eval_top_k", "rollout_top_k"),
    "max_response_len": ("eval_max_response_len", "rollout_max_response_len"),
    "min_new_tokens": ("eval_min_new_tokens",),
    "stop": ("rollout_stop",),
    "stop_token_ids": ("rollout_stop_token_ids",),
    "skip_special_tokens": ("rollout_skip_special_tokens",),
    "input_key": ("eval_input_key", "input_key"),
    "label_key": ("eval_label_key", "label_key"),
    "tool_key": ("eval_tool_key", "tool_key"),
    "metadata_key": ("metadata_key",),
    "apply_chat_template": ("apply_chat_template",),
    "apply_chat_template_kwargs": ("apply_chat_template_kwargs",),
    "custom_rm_path": ("custom_rm_path",),
}


EVAL_KINDS = {
    **dict.fromkeys(("name", "path"), str),
    **dict.fromkeys("custom_rm_path custom_generate_function_path input_key label_key tool_key".split(), str | None),
    **dict.fromkeys("n_samples_per_eval_prompt top_k max_response_len min_new_tokens".split(), int | None),
    **dict.fromkeys("temperature top_p repetition_penalty".split(), int | float | None),
    "apply_chat_template": bool | None,
    "metadata_overrides": dict,
}


def eval_datasets(args: argparse.Namespace) -> list[EvalDataset]:
    """The data sets of --eval-config, else of --eval-prompt-data. Raises UsageError on a malformed one."""
    if args.eval_config:
        rows, defaults = _eval_config(args.eval_config)
    else:
        rows, defaults = _eval_pairs(args.eval_prompt_data or []), {}
    known = {item.name for item in fields(EvalDataset)}
    datasets = []
    for row in rows:
        settings = {**_eval_fallbacks(args), **defaults, **row}
        unknown = sorted(map(str, settings.keys() - known))
        if unknown or "path" not in settings:
            what = f"unknown keys {', '.join(unknown)}" if unknown else "no path"
            raise UsageError(f"--eval-config {args.eval_config}: data set {row.get('name')!r} has {what}")
        wrong = [name for name, value in settings.items() if not isinstance(value, EVAL_KINDS.get(name, object))]
        if wrong:
            raise UsageError(
                f"--eval-config {args.eval_config}: data set {row.get('name')!r}: {wrong[0]} cannot be "
                f"{str(settings[wrong[0]])[:40]!r}"
            )
        datasets.append(EvalDataset(**settings))
    args.eval_prompt_data = [word for dataset in datasets for word in (dataset.name, dataset.path)] or None
    return datasets


def _eval_pairs(words: list[str]) -> list[dict[str, Any]]:
    if len(words) == 1:
        words = ["aime", words[0]]  # slime's name for a single unnamed data set
    if len(words) % 2:
        raise UsageError("--eval-prompt-data takes pairs: NAME PATH [NAME PATH ...]")
    return [{"name": name, "path": path} for name, path in zip(words[::2], words[1::2], strict=True)]


def _eval_config(path: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    config = _read_yaml("--eval-config", path)
    config = config.get("eval", config)
    datasets = config.get("datasets") if isinstance(config, dict) else None
    if isinstance(datasets, dict):
        pairs = datasets.items()
        datasets = [{"name": name, **settings} for name, settings in pairs if isinstance(settings, dict)]
        datasets = datasets if len(datasets) == len(pairs) else []
    if not datasets or not all(isinstance(row, dict) and "name" in row for row in datasets):
        raise UsageError(f"--eval-config {path}: eval.datasets must list data sets, each with a name and a path")
    defaults = config.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise UsageError(f"--eval-config {path}: eval.defaults must be keys and values")
    return datasets, defaults


def _eval_fallbacks(args: argparse.Namespace) -> dict[str, Any]:
    settings = {}
    for name, attributes in EVAL_FALLBACKS.items():
        values = (getattr(args, attribute) for attribute in attributes)
        settings[name] = next((value for value in values if value is not None), None)
    return settings


def _read_yaml(flag: str, path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {path}: no such file")
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{flag} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{flag} {path}: expected keys and values at the top")
    return value
