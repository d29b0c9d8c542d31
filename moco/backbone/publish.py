"""Publish a backbone on the Hub: its model card, and the upload."""

import re
import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from safetensors.torch import load_file

from moco.backbone.load import check_loads_back
from moco.backbone.start import start_in_words
from moco.encoder import TIMM
from moco.errors import UserError, explained
from moco.jsonfile import reading_json
from moco.run.checkpoint import weights_digest

PUBLISHED = ("model.safetensors", "config.json", "README.md", "curves.png")
PAPERS = {
    "v1": "MoCo v1 ([arXiv:1911.05722](https://arxiv.org/abs/1911.05722))",
    "v2": "MoCo v2 ([arXiv:2003.04297](https://arxiv.org/abs/2003.04297))",
    "simclr": "SimCLR ([arXiv:2002.05709](https://arxiv.org/abs/2002.05709))",
}
HIDDEN = ("versions", "data_on_hub", "init_from", "taken_from")  # settings that the card tells in other places
AP_RULES = {
    "voc2007": "VOC2007, 11 points",
    "area": "VOC, area under the curve",
    "box": "COCO, box",
    "mask": "COCO, mask",
}


def push_backbone(run, name, private=False, license=None):
    """Upload a run's backbone with its model card; the repository is created if it does not exist.

    run: a run folder of train_moco.py or linear_probe.py, or a folder of `save_backbone`. name: USER/NAME.
    license: of the weights, for the card, which names none if it is None.
    Everything is written to the folder and loaded back from it before anything is sent, so that a push which fails can
    be repeated.
    Returns the repository's address. Raises UserError if there is nothing to push or the Hub does not take it.
    """
    folder = prepare_folder(Path(run), name, license)
    check_loads_back(folder)
    options = (" --private" if private else "") + (f" --license {license}" if license else "")
    again = f"everything is in {folder}, so try again with `python -m moco.backbone push {run} {name}{options}`"
    rights = "the name must begin with your user name or organisation, and `hf auth login` needs a token that may write"
    with (
        explained("the Hub cannot be reached", again),
        explained(f"the Hub does not take {name}", f"{rights}; {again}", HfHubHTTPError),
        explained(f"{name} cannot be pushed to", again, HFValidationError, LocalTokenNotFoundError),
    ):
        api = huggingface_hub.HfApi()
        url = api.create_repo(name, private=private or None, exist_ok=True)  # None: as the organisation has it
        if private and not api.repo_info(url.repo_id).private:
            raise UserError(f"{name} is there already, and public; make it private on its page, or name another")
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=list(PUBLISHED),
            commit_message="Upload the backbone and its card",
        )
    return str(url)


def prepare_folder(run, name, license=None):
    """The folder of a run's backbone with all that is published in it: card and curves are written here."""
    folder = run / "backbone" if (run / "backbone").is_dir() else run
    if not all((folder / file).exists() for file in PUBLISHED[:2]):
        raise UserError(
            f"{run} has no backbone to push: {folder} lacks {' or '.join(PUBLISHED[:2])}, which train_moco.py writes at"
            " the end of a run and `python -m moco.backbone convert --to timm` of other weights"
        )
    if (run / "curves.png").exists() and folder != run and not (run / "detections.png").exists():  # of pre-training
        shutil.copy(run / "curves.png", folder)
    results = find_results(run, weights_digest(load_file(folder / "model.safetensors")))
    with reading_json(folder / "config.json", "restore it") as config:
        card = model_card(config, results, name, (folder / "curves.png").exists(), license)
    (folder / "README.md").write_text(card)
    return folder


def find_results(run, digest):
    """What linear_probe.py and detect_transfer.py left in results.json of exactly the weights of this digest: a list.

    run: the run folder of the pre-training, or one of theirs in it.
    """
    names = ("linear_probe", "detection")
    folders = [run, *(folder / name for folder in (run, run.parent) for name in names)]
    paths = dict.fromkeys(folder.resolve() / "results.json" for folder in folders)
    found = [read_results(path) for path in paths if path.exists()]
    return [results for results in found if results["backbone_sha256"] == digest]


def read_results(path):
    """One results.json. Raises UserError if what the card shows is missing from it or of the wrong kind."""
    with reading_json(path, "remove it, or run the evaluation again") as results:
        evaluations(results)
        return results | {"backbone_sha256": str(results["backbone_sha256"])}


def public_name(data):
    """(name of --data, whether it is on the Hub); of a folder here the last part, for the path to it is private."""
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", data) is not None and not Path(data).is_dir()
    return data if on_hub else Path(data).resolve().name, on_hub


def model_card(config, results, name, with_curves, license=None):
    """The text of README.md: card.md filled in with how to load, how it was trained, and what was measured.

    config: of config.json. results: a list of results.json. name: USER/NAME. with_curves: whether to show curves.png.
    license: of the weights, None to name none.
    """
    settings, title = config["moco"], name.split("/")[-1]
    channels, _, size = config["pretrained_cfg"]["input_size"]
    small_stem = settings.get("stem") == "small"  # of which timm, and so transformers, knows nothing
    recipe, start = settings.get("recipe"), settings.get("init_from")
    front = ModelCardData(
        library_name=None if small_stem else "timm",
        pipeline_tag="image-feature-extraction",
        tags=["image-feature-extraction", *([] if small_stem else ["timm", "transformers"]), "moco"],
        license=license,
        base_model=start["name"] if start and start["on_hub"] else None,
        datasets=[settings["data"]] if settings.get("data_on_hub") else None,
        metrics=["accuracy"],
        model_name=title,
        eval_results=sum(map(evaluations, results), []) or None,
    )
    shown = {key: value for key, value in settings.items() if key not in HIDDEN}
    shown |= settings.get("versions", {})
    origin = PAPERS.get(recipe.split("-")[0], f"recipe {recipe} of train_moco.py") if recipe else "imported"
    card = ModelCard.from_template(
        front,
        template_path=Path(__file__).parent / "card.md",
        name=name,
        title=title,
        arch=settings.get("arch", config["architecture"]),
        architecture=config["architecture"],
        layers=(config.get("model_args") or {}).get("layers"),  # of resnet10, which torchvision has no name for
        origin=origin,
        start=start and start_in_words(start),
        taken_from=settings.get("taken_from"),
        channels=channels,
        torchvision=not settings.get("arch", "").startswith(TIMM),
        size=f"{channels} channels and {size}" if channels != 3 else size,
        width=config["num_features"],
        small_stem=small_stem,
        settings={key: str(value) for key, value in shown.items()} if recipe else None,
        with_curves=with_curves,
        results=[results_table(each) for each in results],
    )
    return str(card)


def results_table(results):
    """One results.json as a table of the card: what was measured, {column: key}, [(label, {key: percent})], a note.

    Of several classifiers the chosen one alone.
    """
    if "AP" in results:
        what = (
            f"Fine-tuned as a {'Mask' if 'mask' in results else 'Faster'} R-CNN C4 for {results['iterations']}"
            f" iterations on {results['train_images']} images of `{results['data']}`, on its"
            f" {results['test_images']} test images:"
        )
        rows = [(label, results[rule]) for rule, label in AP_RULES.items() if rule in results]
        return {"what": what, "columns": {key: key for key in ("AP", "AP50", "AP75")}, "rows": rows, "note": ""}
    trained = "frozen" if results.get("frozen", True) else "trained with the classifier"
    what = (
        f"On the {results['validation_images']} validation images of `{results['data']}`, {results['classes']} classes,"
        f" the backbone {trained}:"
    )
    approximate = " on cached features (approximate)" if results.get("approximate") else ""
    rows = [(f"linear probe{approximate}, lr {results['lr']:g}", results)] if "top1" in results else []
    rows += [(f"kNN, k {k}", row) for k, row in results.get("knn", {}).items()]
    note = (
        f"The learning rate is the one of {len(results.get('classifiers', []))} that is best on"
        f" {results['held_out_images']} training images held out."
    )
    note = note if len(results.get("classifiers", [])) > 1 else ""
    return {"what": what, "columns": {"top-1": "top1", "top-5": "top5"}, "rows": rows, "note": note}


def evaluations(results):
    """One results.json in the form of the Hub's model-index."""
    detection, table = "AP" in results, results_table(results)
    task = {"task_type": "object-detection" if detection else "image-classification", "dataset_name": results["data"]}
    folder = results["data"] if results["data_on_hub"] else "image-folder"
    task["dataset_type"] = results["metric"].lower() if detection else folder
    shown = [
        (label, name, row[key])
        for label, row in table["rows"]
        for name, key in table["columns"].items()
        if name != "top-5"
    ]
    return [
        EvalResult(
            metric_type=name if detection else "accuracy", metric_name=f"{label} {name}", metric_value=value, **task
        )
        for label, name, value in shown
    ]
