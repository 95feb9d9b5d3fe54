"""Prompts from JSONL or parquet rows, dealt out in groups, in an order that a resumed run continues."""

import copy
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from slime_local.errors import UsageError, one_line
from slime_local.hf_folder import read_json_object
from slime_local.sample import Sample

SLICE = re.compile(r"^(?P<path>.*)@\[(?P<start>(-?[0-9]{1,9})?):(?P<stop>(-?[0-9]{1,9})?)\]$", re.DOTALL)
SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # JSON's escape of half a character


def split_slice(path: str) -> tuple[str, slice]:
    """`file@[a:b]` as the file and the slice of its rows; all rows without one."""
    match = SLICE.match(path)
    if match is None:
        return path, slice(None)
    bounds = (int(text) if text else None for text in match.group("start", "stop"))
    return match["path"], slice(*bounds)


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or of `file@[a:b]`.

    Raises UsageError on a missing or empty file, another format, and a line that is not a JSON object (its number).
    """
    return [row for _, row in read_numbered_rows(path)]


def read_numbered_rows(path: str) -> list[tuple[int, dict[str, Any]]]:
    """As `read_rows`, each row with its line number, from 1."""
    file, rows_wanted = split_slice(path)
    if not os.path.isfile(file):
        raise UsageError(f"no data file {file}")
    if file.endswith(".jsonl"):
        rows = list(_jsonl(Path(file)))
    elif file.endswith(".parquet"):
        rows = list(enumerate(_parquet(file), start=1))
    else:
        raise UsageError(f"{file}: data files end in .jsonl or .parquet")
    rows = rows[rows_wanted]
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json_object(path, number, line)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text: {error}") from error


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{path} line {number} holds half of a surrogate pair: no tokenizer takes it") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UsageError(f"{path} line {number} is not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise UsageError(f"{path} line {number} is not a JSON object")
    return row


def _parquet(path: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{path}: parquet needs pyarrow; install it, or convert the file to .jsonl") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UsageError(f"{path} is not a parquet file that can be read: {error}") from error


def row_tools(row: dict[str, Any], tool_key: str | None) -> list[dict[str, Any]] | None:
    """The row's tools, which may be JSON text. Raises ValueError when they are no list (`null` too, as in slime)."""
    if tool_key is None or tool_key not in row:
        return None
    tools = row[tool_key]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except RecursionError as error:
            raise ValueError(f"{tool_key} is nested too deeply") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{tool_key} is {repr(tools)[:80]}: give a list of objects, or leave the key out")
    return tools


class Dataset:
    """Samples from the rows of `path`, in file order until `shuffle`.

    Prompts longer than `max_length` tokens are dropped where they are text. `render` turns (messages, tools) into the
    prompt text; without it the prompt is the row's own value.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt_key: str,
        label_key: str | None = None,
        tool_key: str | None = None,
        metadata_key: str = "metadata",
        render: Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str] | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        seed: int = 42,
    ):
        self.seed = seed
        self.epoch_id = -1
        keys = (prompt_key, label_key, tool_key, metadata_key)
        samples = [_to_sample(row, *keys, render) for row in read_rows(path)]
        self.origin_samples = _short_enough(samples, tokenizer, max_length)
        if not self.origin_samples:
            raise UsageError(f"{path}: every prompt is longer than --rollout-max-prompt-len {max_length}")
        self.samples = self.origin_samples

    def __len__(self) -> int:
        return len(self.samples)

    def shuffle(self, epoch_id: int) -> None:
        """Put the samples in the order of an epoch, the one that slime draws from the same seed."""
        if epoch_id == self.epoch_id:
            return
        order = list(range(len(self.origin_samples)))
        random.Random(self.seed + epoch_id).shuffle(order)
        self.samples = [self.origin_samples[i] for i in order]
        self.epoch_id = epoch_id


def _to_sample(
    row: dict[str, Any],
    prompt_key: str,
    label_key: str | None,
    tool_key: str | None,
    metadata_key: str,
    render: Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str] | None,
) -> Sample:
    prompt = row.get(prompt_key)
    metadata = dict(row.get(metadata_key) or {})
    tools = row_tools(row, tool_key)
    if tools is not None:
        metadata["tools"] = tools
    if render is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = render(messages, tools)
    return Sample(prompt=prompt, label=row[label_key] if label_key else None, metadata=metadata)


def _short_enough(samples: list[Sample], tokenizer: Any, max_length: int | None) -> list[Sample]:
    if max_length is None or not samples or not isinstance(samples[0].prompt, str):
        return samples
    ids = tokenizer([sample.prompt for sample in samples], add_special_tokens=False)["input_ids"]
    return [sample for sample, prompt_ids in zip(samples, ids, strict=True) if len(prompt_ids) <= max_length]


@cache
def load_tokenizer(path: str) -> Any:
    """The tokenizer of an HF folder. Raises UsageError where none can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, config=_model_type(Path(path)), trust_remote_code=False)
    except Exception as error:  # a broken file raises what the library that reads it happens to raise
        raise UsageError(f"{path}: no tokenizer can be loaded ({one_line(error)})") from error


def _model_type(folder: Path) -> Any:
    """A config with all that AutoTokenizer reads of one where the tokenizer's own file names its class: the model's
    whole config brings a thousand modules, 1.3 seconds of a start. None where transformers has to look for itself."""
    from transformers import PretrainedConfig

    files = folder / "config.json", folder / "tokenizer_config.json"
    if not all(file.is_file() for file in files):
        return None
    model, tokenizer = map(read_json_object, files)
    if "model_type" not in model or "tokenizer_class" not in tokenizer:
        return None
    config = PretrainedConfig(name_or_path=str(folder))
    config.model_type = model["model_type"]
    return config


def template_renderer(tokenizer: Any, options: dict[str, Any] | None) -> Callable[..., str]:
    """The `render` of a Dataset: the tokenizer's chat template with a generation prompt."""

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **(options or {})
        )

    return render


class RolloutDataSource:
    """Groups of --n-samples-per-prompt copies of each prompt, epoch after epoch. The `--data-source-path` class.

    With --disable-rollout-global-dataset, or without --prompt-data, every prompt is empty.
    """

    def __init__(self, args: Any, tokenizer: Any = None):
        self.args = args
        self.tokenizer = tokenizer
        self.epoch_id = 0
        self.sample_offset = 0
        self.sample_group_index = 0
        self.sample_index = 0
        self.metadata: dict[str, Any] = {}
        self.dataset = self._dataset() if args.rollout_global_dataset and args.prompt_data else None
        self._shuffle()

    def _dataset(self) -> Dataset:
        args = self.args
        tokenizer = self.tokenizer or load_tokenizer(args.hf_checkpoint)
        render = template_renderer(tokenizer, args.apply_chat_template_kwargs) if args.apply_chat_template else None
        return Dataset(
            args.prompt_data,
            prompt_key=args.input_key,
            label_key=args.label_key,
            tool_key=args.tool_key,
            metadata_key=args.metadata_key,
            render=render,
            tokenizer=tokenizer,
            max_length=args.rollout_max_prompt_len,
            seed=args.rollout_seed,
        )

    def __len__(self) -> int:
        return len(self.dataset) if self.dataset is not None else 0

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """The next `num_samples` groups, each of --n-samples-per-prompt samples with their own index."""
        return [self._group(prompt) for prompt in self._prompts(num_samples)]

    def add_samples(self, samples: list[list[Sample]]) -> None:
        """Nothing is taken back: there are no partial rollouts."""
        raise RuntimeError("this data source takes no samples back")

    def _prompts(self, count: int) -> list[Sample]:
        if self.dataset is None:
            return [Sample() for _ in range(count)]
        return list(itertools.islice(self._forever(), count))

    def _forever(self) -> Iterator[Sample]:
        while True:
            if self.sample_offset >= len(self.dataset):
                self.epoch_id += 1
                self.sample_offset = 0
                self._shuffle()
            self.sample_offset += 1
            yield self.dataset.samples[self.sample_offset - 1]

    def _group(self, prompt: Sample) -> list[Sample]:
        group = []
        for _ in range(self.args.n_samples_per_prompt):
            sample = copy.deepcopy(prompt)
            sample.group_index, sample.index = self.sample_group_index, self.sample_index
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group

    def _shuffle(self) -> None:
        if self.dataset is not None and self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def state_dict(self) -> dict[str, Any]:
        """Where the next group comes from; JSON-able."""
        return {
            "epoch_id": self.epoch_id,
            "sample_offset": self.sample_offset,
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "metadata": self.metadata,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for name in ("epoch_id", "sample_offset", "sample_group_index", "sample_index", "metadata"):
            setattr(self, name, state[name])
        self._shuffle()
