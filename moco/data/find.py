"""Where the data of a name lies: in a folder, in what `datasets` saved, or in one commit of a dataset on the Hub."""

import hashlib
import itertools
import json
import re
import tempfile
from pathlib import Path

import datasets
import huggingface_hub
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from moco.data.folder import TEST, TRAIN, folder_splits
from moco.data.hub import download, shared_folder
from moco.data.shapes import shapes_dataset
from moco.errors import UserError, explained, first_line
from moco.jsonfile import write_json


def find_splits(name, here, revision, config, split, commit, streaming):
    """((train, test), features, commit): each split a Hugging Face dataset, a list of paths of parquet files, or None.

    here: whether `name` is a folder; otherwise it is on the Hub, or "shapes". features: what a dataset card says of the
    columns, or None. commit: USER/NAME@COMMIT to read, or None; returned is the one that is read.
    """
    if name == "shapes":
        check_home()
        with PartialState().local_main_process_first():  # drawn once per machine
            return (shapes_dataset("train"), shapes_dataset("test")), None, None
    if not here:
        check_home()
        return find_on_hub(name, revision, config, split, commit, streaming)
    folder, features = Path(name), None
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        splits = saved_splits(folder)
    elif not (splits := folder_splits(name, split)):
        splits, features = builder_splits(open_builder(name, config), name)
    elif config:
        raise UserError(f"--config {config} names a part of a dataset on the Hub, which --data {name} is not")
    return train_and_test(splits, split, name), features, None


def saved_splits(folder):
    """{split: data set} of what `save_to_disk` wrote; a split without rows, which it cannot read again, is left out."""
    if not (folder / "dataset_dict.json").exists():
        return {"train": datasets.load_from_disk(str(folder))}
    splits = {}
    for split in json.loads((folder / "dataset_dict.json").read_text())["splits"]:
        if json.loads((folder / split / "state.json").read_text())["_data_files"]:
            splits[split] = datasets.load_from_disk(str(folder / split))
        elif PartialState().is_main_process:
            print(f"data    the {split} split of {folder} has no rows, and is left out")
    return splits


def check_home():
    """Raise UserError unless what is downloaded or drawn can be written."""
    for folder in (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_ASSETS_CACHE):
        with explained(f"{folder} cannot be written", "set HF_HOME to a folder that can", OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()


def find_on_hub(name, revision, config, split, commit, streaming):
    """What `find_splits` has of a dataset on the Hub: at one commit, whatever its branch does later."""
    begun = commit.partition("@")[2] if commit and commit.startswith(f"{name}@") else None
    downloads = downloads_of(name, begun or revision, config, split)
    newest = broadcast_object_list([check_hub_name(name, downloads, revision)])[0]
    if begun and newest not in (None, begun) and PartialState().is_main_process:
        print(f"data    {name} has moved to {newest[:12]} since the run began, which goes on with {begun[:12]}")
    if newest is None and downloads.exists():
        paths, features = json.loads(downloads.read_text()), None
        if len(paths) > 2:
            features = datasets.Features.from_dict(paths[2]) if paths[2] else None
        found = re.search("/snapshots/([^/]+)/", paths[0][0])
        return tuple(paths[:2]), features, found and f"{name}@{found[1]}"
    commit = begun or newest
    builder = open_builder(name, config, commit)
    splits, features = builder_splits(builder, name, streaming)
    train, test = train_and_test(splits, split, name)
    if isinstance(train, list) and not streaming:
        with PartialState().local_main_process_first():
            train, test = download(train), test and download(test)
        if PartialState().is_local_main_process:
            known = [train, test, features and features.to_dict()]
            for asked in {revision, commit}:  # for a new run, and for one that resumes
                write_json(downloads_of(name, asked, config, split), known)
    return (train, test), features, commit and f"{name}@{commit}"


def open_builder(name, config, commit=None):
    """The builder of `datasets`. Raises UserError that lists the configurations if one of several must be named."""
    try:
        return datasets.load_dataset_builder(name, config, revision=commit)
    except ValueError as error:
        if "onfig" not in str(error):
            raise
        known = ", ".join(datasets.get_dataset_config_names(name, revision=commit))
        what = f"--config {config} is not in {name}, which has" if config else f"--data {name} has the configurations"
        raise UserError(f"{what} {known}; name one with --config") from error


def builder_splits(builder, name, streaming=False):
    """({split: paths of its parquet files, or a data set}, the features that the dataset card names or None)."""
    splits = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
    if splits and all(path.endswith(".parquet") for path in itertools.chain(*splits.values())):
        return splits, builder.info.features
    if streaming and PartialState().is_main_process:
        print(f"data    {name} is not in parquet files: downloaded once per machine instead of being streamed")
    with PartialState().local_main_process_first():
        builder.download_and_prepare()
    return builder.as_dataset(), None


def downloads_of(name, revision, config=None, split=None):
    """Where a dataset's downloaded parquet files are listed, for when the Hub cannot be reached."""
    key = (name, revision) + ((config, split) if config or split else ())
    return shared_folder("downloads") / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:40]}.json"


def train_and_test(splits, split, name):
    """Of {split: data}, what to train on and what to test on, or None; what is neither is named.

    split: to train on, if it is said. Raises UserError if there is no such split.
    """
    if not splits:
        raise UserError(f"--data {name} has no rows")
    if split is not None and split not in splits:
        raise UserError(f"--split {split} is not in {name}, whose splits are {', '.join(splits)}")
    others = [each for each in splits if each not in TEST]
    train = split or next((each for each in TRAIN if each in splits), (others or list(splits))[0])
    test = next((each for each in TEST if each in splits and each != train), None)
    left_out = [each for each in splits if each not in (train, test)]
    if left_out and PartialState().is_main_process:
        print(f"data    split {train} to train on, {test or 'none'} to test on; left out: {', '.join(left_out)}")
    return splits[train], splits.get(test)


def check_hub_name(name, downloads=None, revision=None):
    """The commit that a name's revision (None: main) stands for; None if the Hub does not answer but the data is here.

    downloads: the file that lists what was downloaded, or None.

    Raises UserError at once for a name or revision that the Hub does not have, and if it does not answer and nothing is
    here.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or ".." in name:
        raise UserError(f"--data {name} is neither 'shapes', nor a folder here, nor of the Hub's form USER/NAME")
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise UserError(f"--revision {revision} is not in {name} ({first_line(error)}); name another") from error
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise UserError(
            f"--data {name} is neither a folder here nor a dataset you can read on the Hub ({first_line(error)}); check"
            f" the name, or if it is private or gated accept its terms on the Hub and run `hf auth login`"
        ) from error
    except Exception as error:  # no network, no answer, offline mode: each client library has its own exceptions
        if downloads and downloads.exists():
            return None
        try:
            datasets.load.CachedDatasetModuleFactory(name).get_module()
        except FileNotFoundError:
            raise UserError(
                f"--data {name} is neither a folder here nor downloaded before, and the Hub cannot be reached"
                f" ({first_line(error)}); once it can: accept the dataset's terms there if it asks, `hf auth login`"
            ) from error
        return None
