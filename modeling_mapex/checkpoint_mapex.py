"""Weights on disk and on the Hub: files grouped by the modalities that need them, and reading only what a pruned model
keeps. Files are safetensors with the standard index, so that stock transformers opens any of them whole.
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import (
    _CACHED_NO_EXIST,
    is_offline_mode,
    split_state_dict_into_shards_factory,
    try_to_load_from_cache,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file
from transformers.utils.hub import cached_files, hf_api
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from .modelcard_mapex import CARD_NAME, fetch_model_card
from .pruning_mapex import MODALITY_KEY, KeptPart, kept_part, plan_experts


# What replaces the weights of an earlier push; other files of a repository, like those of a variant, stay.
WEIGHT_FILE_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


class WeightFiles(NamedTuple):
    """The files of a checkpoint.

    Attributes:
        folder (`Path`): Where they are, or will be once they are fetched.
        weight_map (`dict[str, str]`): Tensor to the name of its file.
        index (`str`, *optional*): Name of the index; `None` for a single file.
    """

    folder: Path
    weight_map: dict[str, str]
    index: str | None

    @property
    def names(self) -> list[str]:
        """All files, the index included."""
        return sorted({*self.weight_map.values(), *([self.index] if self.index else [])})


def with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` to `model.fp16.safetensors`, as transformers names a variant."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def weight_names(variant: str | None = None) -> tuple[str, str]:
    """What transformers calls the weights of a checkpoint: the single file, which it prefers, and the index."""
    return with_variant(SAFE_WEIGHTS_NAME, variant), with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)


def find_weights(folder: str | os.PathLike, variant: str | None = None) -> WeightFiles | None:
    """The safetensors weights in a folder, if there are any: a single file, or what the index says.

    Raises:
        OSError: a file that is damaged.
        ValueError: an index that names a file outside the folder.
    """
    folder = Path(folder)
    single, index = weight_names(variant)
    if (folder / single).is_file():
        with open_weights(folder / single) as handle:
            return WeightFiles(folder, dict.fromkeys(handle.keys(), single), None)
    if (folder / index).is_file():
        return WeightFiles(folder, read_index(folder / index), index)
    return None


def read_index(file: Path) -> dict[str, str]:
    """The weight map of an index: tensor to file name.

    Raises:
        OSError: an index that cannot be read.
        ValueError: one that names anything but safetensors files beside it.
    """
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise OSError(
            f"{file} is not an index of weights ({type(error).__name__}: {error}). Download or save the checkpoint "
            "again."
        ) from error
    for name in sorted(names, key=str):
        # What another machine wrote decides which files are opened here: nothing but plain names.
        if not isinstance(name, str) or re.fullmatch(r"[\w.-]+\.safetensors", name) is None:
            raise ValueError(
                f"{file} places weights in `{name}`. Only safetensors files beside the index are opened: do not trust "
                "this checkpoint, or convert it if the file is yours."
            )
    return weight_map


@contextlib.contextmanager
def open_weights(file: Path, *, in_place: bool = True):
    """An open safetensors file.

    Args:
        file (`Path`): A safetensors file.
        in_place (`bool`): Whether tensors are views of the mapped file, or copies of what was read.

    Raises:
        OSError: the file is damaged.
    """
    try:
        handle = safe_open(file, framework="pt", backend="mmap" if in_place else "pread")
    except SafetensorError as error:
        raise OSError(damaged(file, error)) from error
    with handle:
        yield handle


def damaged(file: str | os.PathLike, error: Exception | str) -> str:
    """What to say of a file that cannot be read."""
    return (
        f"{file} is truncated or damaged ({error}). If it was downloaded, load again with `force_download=True`; "
        "otherwise save or copy it again."
    )


class StoredKey(NamedTuple):
    """Where a tensor of a file belongs in memory: the name there, and its row if experts are stacked there."""

    key: str
    row: int | None


_BLOCK = re.compile(r"layers\.(\d+)\.")
_STORED_EXPERT = re.compile(r"^(.*layers\.\d+\.mlp\.experts\.)(\d+)\.(up_proj|down_proj)\.(weight|bias)$")


def stored_key(key: str) -> StoredKey:
    """`layers.1.mlp.experts.3.up_proj.bias` to row 3 of `layers.1.mlp.experts.up_proj_bias`; others stay."""
    found = _STORED_EXPERT.match(key)
    if found is None:
        return StoredKey(key, None)
    prefix, row, name, kind = found.groups()
    return StoredKey(f"{prefix}{name}{'_bias' if kind == 'bias' else ''}", int(row))


# Writing: all or nothing, and files grouped by modality.


@contextlib.contextmanager
def staged(folder: str | os.PathLike, variant: str | None = None):
    """A folder to save to, whose content replaces that of `folder` once all of it is written: an error, a full disk or
    Ctrl-C leave the earlier checkpoint as it was. Weight files of the earlier checkpoint that the new one does not have
    are removed, since transformers would prefer some of them.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give the name of a folder to save to.")
    staging = folder / "_saving"  # Trainer uploads nothing that starts with an underscore
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        new = find_weights(staging, variant)
        stale = [] if new is None else _weight_files(folder, variant) - set(new.names)
        for file in staging.iterdir():
            file.replace(folder / file.name)
        for name in stale:
            (folder / name).unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _weight_files(folder: Path, variant: str | None) -> set[str]:
    """Names of all weight files of a checkpoint in `folder`: the single one, and an index with what it names."""
    single, index = weight_names(variant)
    names = {single, index}
    if (folder / index).is_file():
        # An index that cannot be read is replaced as well; then nothing says which files belonged to it.
        with contextlib.suppress(OSError, ValueError):
            names |= set(read_index(folder / index).values())
    return {name for name in names if (folder / name).is_file()}


def group_by_modality(
    folder: str | os.PathLike,
    config,
    *,
    coverage: float = 0.95,
    criterion: str = "saliency",
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
) -> None:
    """Arrange the weights in `folder`, saved by `save_pretrained`, in files by the modalities that need them.

    `model-trunk.safetensors` is what every modality needs. `model-experts-s1.safetensors` is what only s1 needs: its
    patch embedding, and the experts that pruning for s1 keeps and pruning for any other modality does not;
    `model-experts-s1-s2.safetensors` are the experts that both need, and so on for each set of modalities;
    `model-unused-experts.safetensors` are those that none needs. The pretraining decoder, which a task does not need,
    is `model-decoder.safetensors` and one file with the head of each modality. Stock transformers opens them by the
    index; `from_pretrained(modalities=...)` opens those it needs.

    Args:
        folder (`str` or `os.PathLike`): With `model.safetensors` or an index.
        config (`MapexConfig`): With expert statistics.
        coverage (`float`), criterion (`str`):
            As in `prune_for_modalities`: which experts a modality needs. Pruning with others works as well, and reads
            from more files.
        max_shard_size (`int` or `str`): A group beyond it is split, as by `save_pretrained`.
        variant (`str`, *optional*): As in `save_pretrained`.

    Raises:
        ValueError: modalities without statistics.
        FileNotFoundError: no weights.
    """
    modalities = list(config.modalities)
    plans = {name: plan_experts(config, [name], coverage=coverage, criterion=criterion) for name in modalities}
    files = find_weights(folder, variant)
    if files is None:
        raise FileNotFoundError(f"There are no safetensors weights in {folder}: save the model there first.")
    single, index = weight_names(variant)
    stem = single.removesuffix(".safetensors")
    groups: dict[str, dict[str, int]] = {}
    with contextlib.ExitStack() as stack:
        handles = _open_all(stack, files)
        for key in sorted(files.weight_map):
            name = f"{stem}-{_group_of(key, config, plans)}"
            groups.setdefault(name, {})[key] = _num_bytes(handles[files.weight_map[key]].get_slice(key))
        weight_map: dict[str, str] = {}
        for name, sizes in groups.items():
            split = split_state_dict_into_shards_factory(
                sizes,
                get_storage_size=int,
                filename_pattern=f"{name}{{suffix}}.safetensors",
                max_shard_size=max_shard_size,
            )
            for filename, keys in split.filename_to_tensors.items():
                tensors = {key: handles[files.weight_map[key]].get_tensor(key) for key in keys}
                save_file(tensors, files.folder / filename, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(keys, filename))
    metadata = {"total_size": sum(sum(sizes.values()) for sizes in groups.values())}
    content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    (files.folder / index).write_text(content, encoding="utf-8")
    for name in set(files.names) - {index, *weight_map.values()}:
        (files.folder / name).unlink()


def _open_all(stack: contextlib.ExitStack, files: WeightFiles) -> dict[str, Any]:
    return {
        name: stack.enter_context(open_weights(files.folder / name)) for name in sorted(set(files.weight_map.values()))
    }


def _num_bytes(stored) -> int:
    size = int(re.search(r"\d+", stored.get_dtype()).group()) // 8
    for length in stored.get_shape():
        size *= length
    return size


def _group_of(key: str, config, plans: dict[str, list[list[int]]]) -> str:
    """Name of the group of a stored tensor; `plans` are the experts that each modality needs."""
    if found := MODALITY_KEY.search(key):
        kind, name = found.groups()
        return f"decoder-{name}" if kind == "heads" else _experts_group([name])
    if key.startswith("decoder."):
        return "decoder"
    name, row = stored_key(key)
    if row is not None:
        layer = config.moe_layers.index(int(_BLOCK.search(name).group(1)))
        expert = config.expert_ids[layer][row]
        return _experts_group([name for name, plan in plans.items() if expert in plan[layer]])
    return "trunk"


def _experts_group(modalities: list[str]) -> str:
    if not modalities:
        return "unused-experts"
    names = "-".join(sorted(modalities))
    if len(names) > 100:  # file names have an end
        names = f"{len(modalities)}-modalities-{zlib.crc32(names.encode()):08x}"
    return f"experts-{names}"


# Reading: only what a pruned model keeps.


class Reading(NamedTuple):
    """How one tensor of a pruned model comes from stored ones.

    Attributes:
        keys (`list[str]`): Stored tensors; several are rows to be stacked.
        part (`KeptPart`): Its name, and what is kept of a tensor that is stored in one piece.
        stacked (`bool`): Whether `keys` are rows, one expert each.
    """

    keys: list[str]
    part: KeptPart
    stacked: bool


def plan_reading(weight_map: dict[str, str], config, pruned, ignored: list[str]) -> dict[str, Reading]:
    """What has to be read for a pruned model: name of each of its tensors to where it comes from.

    Args:
        weight_map (`dict[str, str]`): Of the stored checkpoint, experts one by one or stacked.
        config, pruned (`MapexConfig`): Of the checkpoint and of the result.
        ignored (`list[str]`): Regular expressions of stored tensors that the model to be built does not have.

    Raises:
        ValueError: an expert that is to be kept is not in the checkpoint.
    """
    sources: dict[str, dict[int | None, str]] = {}
    for key in weight_map:
        if not any(re.search(pattern, key) for pattern in ignored):
            name, row = stored_key(key)
            sources.setdefault(name, {})[row] = key
    plan = {}
    for name, rows in sources.items():
        part = kept_part(name, config, pruned)
        if part is None:
            continue
        if None in rows:
            plan[part.key] = Reading([rows[None]], part, stacked=False)
            continue
        kept = part.index[0]
        num_experts = config.num_layer_experts[int(_BLOCK.search(name).group(1))]
        wanted = [kept] if isinstance(kept, int) else range(num_experts) if kept is None else kept
        missing = [row for row in wanted if row not in rows]
        if missing:
            raise ValueError(f"The checkpoint lacks experts {missing} of `{name}`: save or push it again, complete.")
        plan[part.key] = Reading([rows[row] for row in wanted], KeptPart(part.key), stacked=not isinstance(kept, int))
    return plan


class StoredTensor:
    """A tensor of the pruned model that is still on disk, in the form in which transformers takes the slices of a file:
    it is read when it is indexed.

    What is kept whole stays a view of the mapped file, as transformers has it. Stacks and parts are copies: for these
    the file is mapped anew and let go, so that pages of it that were only read do not take up memory.

    Args:
        reading (`Reading`): Which stored tensors, and what of them.
        files (`list[Path]`): The file of each.
        opened (`dict`): The files, open.
        in_place (`bool`): Whether to map files, or to read them.
    """

    def __init__(self, reading: Reading, files: list[Path], opened: dict[Path, Any], in_place: bool):
        self.reading = reading
        self.files = files
        self.opened = opened
        self.in_place = in_place

    def get_shape(self) -> list[int]:
        shape = list(self.opened[self.files[0]].get_slice(self.reading.keys[0]).get_shape())
        if self.reading.stacked:
            return [len(self.files), *shape]
        return list(self.reading.part.of(torch.empty(shape, device="meta")).shape)

    def __getitem__(self, index) -> torch.Tensor:
        reading = self.reading
        if not reading.stacked and reading.part.is_whole:
            return self.opened[self.files[0]].get_tensor(reading.keys[0])[index]
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(open_weights(file, in_place=self.in_place)) for file in set(self.files)}
            values = [reading.part.of(opened[file].get_tensor(key)) for file, key in zip(self.files, reading.keys)]
            return (torch.stack(values) if reading.stacked else values[0])[index]


class Repository:
    """Where a checkpoint is: a folder, or a repository of the Hub at one commit.

    Args:
        name (`str` or `os.PathLike`): Folder or repository id.
        subfolder (`str`), variant (`str`, *optional*): As in `from_pretrained`.
        hub (`dict`): What fetching takes: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
            `proxies`.
    """

    def __init__(self, name: str | os.PathLike, *, subfolder: str = "", variant: str | None = None, **hub):
        self.name = str(name)
        self.subfolder = subfolder
        self.variant = variant
        self.hub = hub

    def find_weights(self) -> WeightFiles:
        """What is where. Fetches an index, or a file that is the only one.

        Raises:
            OSError: no safetensors weights, or damaged ones.
            ValueError: an index that names files elsewhere.
        """
        if os.path.isdir(self.name):
            files = find_weights(Path(self.name, self.subfolder), self.variant)
        else:
            single, index = weight_names(self.variant)
            found = self._cached(single) or self._cached(index)
            files = None if found is None else find_weights(Path(found).parent, self.variant)
        if files is None:
            raise OSError(self.no_weights())
        return files

    def _cached(self, name: str) -> str | None:
        return cached_file(
            self.name, name, subfolder=self.subfolder, _raise_exceptions_for_missing_entries=False, **self.hub
        )

    def is_adapter(self) -> bool:
        """Whether a folder holds an adapter (peft) alone, which says itself what it belongs to."""
        adapter = Path(self.name, self.subfolder, ADAPTER_CONFIG_NAME)
        return adapter.is_file() and self.is_known_to_lack_weights()

    def is_known_to_lack_weights(self) -> bool:
        """Whether an attempt to load has found that there are no safetensors weights."""
        names = weight_names(self.variant)
        if os.path.isdir(self.name):
            return not any(Path(self.name, self.subfolder, name).is_file() for name in names)
        place = {"cache_dir": self.hub.get("cache_dir"), "revision": getattr(self.hub["revision"], "resolved", None)}
        return all(try_to_load_from_cache(self.name, self._path(name), **place) is _CACHED_NO_EXIST for name in names)

    def _path(self, name: str) -> str:
        """Of a file, in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def no_weights(self) -> str:
        """What to say where there are no safetensors weights."""
        wanted, _ = weight_names(self.variant)
        offline = self.hub.get("local_files_only") or is_offline_mode()
        for pickled in _PICKLED_WEIGHTS:
            if os.path.isdir(self.name):
                offered = Path(self.name, self.subfolder, pickled).is_file()
            else:
                places = {key: self.hub.get(key) for key in ("revision", "token", "cache_dir", "proxies")}
                offered = not offline and has_file(self.name, self._path(pickled), **places)
            if offered:
                return (
                    f"{self.name} offers its weights as `{pickled}`, which Python can run as code. MAPEX opens "
                    f"safetensors only. If you trust the file, convert it once: "
                    f'`safetensors.torch.save_file(torch.load("{pickled}", weights_only=True), "{wanted}", '
                    'metadata={"format": "pt"})`.'
                )
        where = "in the cache, and nothing is fetched offline" if offline else "there"
        return f"{self.name} has no weights to open: neither `{wanted}` nor its index is {where}."

    def fetch(self, files: WeightFiles, names: list[str]) -> Path:
        """Make sure that some of the files are at hand; their folder."""
        if not os.path.isdir(self.name) and files.index is not None:
            found = cached_files(self.name, names, subfolder=self.subfolder, **self.hub)
            return Path(found[0]).parent
        missing = [name for name in names if not (files.folder / name).is_file()]
        if missing:
            raise OSError(f"{files.folder} lacks {missing}, which its index names. Save or copy the checkpoint again.")
        return files.folder

    def damaged(self) -> str | None:
        """What to say of the first weight file at hand that cannot be opened, if there is one."""
        local = Repository(
            self.name, subfolder=self.subfolder, variant=self.variant, **{**self.hub, "local_files_only": True}
        )
        try:
            files = local.find_weights()
            folder = local.fetch(files, files.names)
            for name in sorted(set(files.weight_map.values())):
                with open_weights(folder / name):
                    pass
        except OSError as error:
            return str(error)
        return None


@contextlib.contextmanager
def open_pruned(repository: Repository, config, pruned, ignored: list[str], *, in_place: bool = True):
    """The tensors of a pruned model, none of them read yet: `dict[str, StoredTensor]`. Files stay open inside.

    Args:
        repository (`Repository`): Where the checkpoint is. Only files that hold something to be kept are fetched.
        config, pruned (`MapexConfig`), ignored (`list[str]`): As in [`plan_reading`].
        in_place (`bool`): Whether what is kept whole may be a view of the mapped file.

    Raises:
        OSError: files that are missing, damaged, or cannot be fetched.
        ValueError: an index that names files elsewhere, or an incomplete checkpoint.
    """
    files = repository.find_weights()
    plan = plan_reading(files.weight_map, config, pruned, ignored)
    needed = sorted({files.weight_map[key] for reading in plan.values() for key in reading.keys})
    folder = repository.fetch(files, needed)
    with contextlib.ExitStack() as stack:
        opened = {folder / name: stack.enter_context(open_weights(folder / name, in_place=in_place)) for name in needed}
        held = {file: set(handle.keys()) for file, handle in opened.items()}
        tensors = {}
        for name, reading in plan.items():
            places = [folder / files.weight_map[key] for key in reading.keys]
            for file, key in zip(places, reading.keys):
                if key not in held[file]:
                    raise OSError(damaged(file, f"it lacks `{key}`, which the index places there"))
            tensors[name] = StoredTensor(reading, places, opened, in_place)
        yield tensors


# Pushing.


def upload_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    write_card: Callable[[str], None] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
):
    """Upload a saved checkpoint in one commit: weights, configurations, code and card, and no other files of the
    folder. Weight files in the repository that the folder does not have are deleted. A model card that was edited in
    the repository replaces one in the folder that was not.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` wrote.
        repo_id (`str`): `"user/name"`, or a name in your own account. Made if it does not exist.
        write_card (`Callable`, *optional*): Called with the full repository id once the card that is there is in the
            folder, to write the one to be uploaded.
        private, token, revision, create_pr, commit_message, commit_description:
            As in `push_to_hub`; a branch `revision` is made if it does not exist.

    Returns:
        `CommitInfo` of huggingface_hub.
    """
    api = hf_api()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr") and not create_pr:
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    fetch_model_card(folder, repo_id, revision=revision, token=token)
    if write_card is not None:
        write_card(repo_id)
    files = find_weights(folder)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=["*.json", "*.py", CARD_NAME, "adapter_model.safetensors", *(files.names if files else [])],
        ignore_patterns=["*/*", "trainer_state.json"],
        delete_patterns=list(WEIGHT_FILE_PATTERNS) if files else None,
        commit_message=commit_message or "Upload MAPEX model",
        commit_description=commit_description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )
