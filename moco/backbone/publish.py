"""Publish a backbone on the Hub: its model card, and the upload."""

import re
import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from safetensors.torch import load_file

from moco.errors import UserError, explained
from moco.jsonfile import reading_json
from moco.run.checkpoint import weights_digest

PUBLISHED = ("model.safetensors", "config.json", "README.md", "curves.png")
PAPERS = {
    "v1": "MoCo v1 ([arXiv:1911.05722](https://arxiv.org/abs/1911.05722))",
    "v2": "MoCo v2 ([arXiv:2003.04297](https://arxiv.org/abs/2003.04297))",
    "simclr": "SimCLR ([arXiv:2002.05709](https://arxiv.org/abs/2002.05709))",
}
AP_RULES = {
    "voc2007": "VOC2007, 11 points",
    "area": "VOC, area under the curve",
    "box": "COCO, box",
    "mask": "COCO, mask",
}


def push_backbone(run, name, private=False):
    """Upload a run's backbone with its model card; the repository is created if it does not exist.

    run: a run folder of train_moco.py or linear_probe.py, or a folder of `save_backbone`. name: USER/NAME.
    Everything is written to the folder before anything is sent, so that a push which fails can be repeated.
    Returns the repository's address. Raises UserError if there is nothing to push or the Hub does not take it.
    """
    folder = prepare_folder(Path(run), name)
    private_flag = " --private" if private else ""
    again = f"everything is in {folder}, so try again with `python -m moco.backbone push {run} {name}{private_flag}`"
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


def check_push(name):
    """Raise UserError before a run whose push to `name` at its end could not succeed without a login."""
    later = "`hf auth login`, or leave the flag out and `python -m moco.backbone push` when the run is done"
    with (
        explained(f"--push-to-hub {name}: the Hub refuses your login or cannot be reached", later),
        explained(
            f"--push-to-hub {name}", "name USER/NAME, and `hf auth login`", HFValidationError, LocalTokenNotFoundError
        ),
    ):
        huggingface_hub.utils.validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("it lacks the user or organisation")
        huggingface_hub.HfApi().whoami()


def prepare_folder(run, name):
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
        card = model_card(config, results, name, (folder / "curves.png").exists())
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
        results_table(results)
        evaluations(results)
        return results | {"backbone_sha256": str(results["backbone_sha256"])}


def public_name(data):
    """(name of --data, whether it is on the Hub); of a folder here the last part, for the path to it is private."""
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", data) is not None and not Path(data).is_dir()
    return data if on_hub else Path(data).resolve().name, on_hub


def model_card(config, results, name, with_curves):
    """The text of README.md: front matter, how to load, how it was trained, and what was measured.

    config: of config.json. results: a list of results.json. name: USER/NAME. with_curves: whether to show curves.png.
    """
    settings = config["moco"]
    small = settings.get("stem") == "small"  # of which timm, and so transformers, knows nothing
    front = ModelCardData(
        library_name=None if small else "timm",
        pipeline_tag="image-feature-extraction",
        tags=["image-feature-extraction", *([] if small else ["timm", "transformers"]), "moco"],
        license="mit" if settings.get("recipe") else "other",  # imported weights keep their own, which is not known
        datasets=[settings["data"]] if settings.get("data_on_hub") else None,
        metrics=["accuracy"],
        model_name=name.split("/")[-1],
        eval_results=sum(map(evaluations, results), []) or None,
    )
    recipe = settings.get("recipe", "")
    how = PAPERS.get(recipe.split("-")[0], f"recipe {recipe} of train_moco.py") if recipe else "imported from elsewhere"
    size = config["pretrained_cfg"]["input_size"][-1]
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {name.split('/')[-1]}\n",
        f"A {settings.get('arch', config['architecture'])} backbone without a head, {how}: images of {size} pixels ->"
        f" {config['num_features']} features.\n",
        "## Load\n",
        loading(config, name, small),
        "## Training\n",
        training(settings),
        "![loss, contrast accuracy, kNN accuracy and learning rate](curves.png)\n" if with_curves else "",
        "## Results\n",
        *(map(results_table, results) if results else ["Not evaluated.\n"]),
    ]
    return "\n".join(part for part in parts if part)


def measured(results):
    """One results.json as (numbers {name: key}, what was measured, [(label, {key: percent})], a note on the choice).

    Of several classifiers the chosen one alone.
    """
    if "AP" in results:
        what = (
            f"Fine-tuned as a {'Mask' if 'mask' in results else 'Faster'} R-CNN C4 for {results['iterations']}"
            f" iterations on {results['train_images']} images of `{results['data']}`, on its"
            f" {results['test_images']} test images:\n"
        )
        rows = [(label, results[rule]) for rule, label in AP_RULES.items() if rule in results]
        return {key: key for key in ("AP", "AP50", "AP75")}, what, rows, []
    what = (
        f"On the {results['validation_images']} validation images of `{results['data']}`, {results['classes']} classes,"
        " the backbone frozen:\n"
    )
    approximate = " on cached features (approximate)" if results.get("approximate") else ""
    rows = [(f"linear probe{approximate}, lr {results['lr']:g}", results)] if "top1" in results else []
    rows += [(f"kNN, k {k}", row) for k, row in results.get("knn", {}).items()]
    note = (
        f"\nOf {len(results.get('classifiers', []))} learning rates the one was taken that is best on"
        f" {results['held_out_images']} training images held out."
    )
    return {"top-1": "top1", "top-5": "top5"}, what, rows, [note] if len(results.get("classifiers", [])) > 1 else []


def evaluations(results):
    """One results.json in the form of the Hub's model-index."""
    detection, (numbers, _, rows, _) = "AP" in results, measured(results)
    task = {"task_type": "object-detection" if detection else "image-classification", "dataset_name": results["data"]}
    folder = results["data"] if results["data_on_hub"] else "image-folder"
    task["dataset_type"] = results["metric"].lower() if detection else folder
    shown = [(label, name, row[numbers[name]]) for label, row in rows for name in numbers if name != "top-5"]
    return [
        EvalResult(
            metric_type=name if detection else "accuracy", metric_name=f"{label} {name}", metric_value=value, **task
        )
        for label, name, value in shown
    ]


def results_table(results):
    numbers, what, rows, note = measured(results)
    lines = [what, f"| | {' | '.join(f'{name}, %' for name in numbers)} |", "|---" * (1 + len(numbers)) + "|"]
    lines += [f"| {label} | {' | '.join(f'{row[key]:.2f}' for key in numbers.values())} |" for label, row in rows]
    return "\n".join([*lines, *note]) + "\n"


def loading(config, name, small):
    """Code that loads the backbone in each library that can."""
    arch, arguments = config["architecture"], config.get("model_args")
    fetch = (
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
        f'weights = load_file(hf_hub_download("{name}", "model.safetensors"))'
    )
    build = f"model = torchvision.models.{arch}()"
    if arguments:  # resnet10, which torchvision has no name for
        build = (
            "model = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock,"
            f" {list(arguments['layers'])})"
        )
    if small:
        build += (
            "\nmodel.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)"
            "\nmodel.maxpool = torch.nn.Identity()"
        )
    codes = {
        "timm": "import timm\n\n# num_classes=10 adds a head, features_only=True gives feature maps\n"
        f'model = timm.create_model("hf-hub:{name}", pretrained=True)',
        "transformers": "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'model = AutoModel.from_pretrained("{name}")\nprocessor = AutoImageProcessor.from_pretrained("{name}")',
        "torchvision": f"import torch\nimport torchvision\n{fetch}\n{build}\nmodel.fc = torch.nn.Identity()\n"
        "model.load_state_dict(weights)",
    }
    shown = {library: code for library, code in codes.items() if not small or library == "torchvision"}
    blocks = [f"{library}:\n\n```python\n{code}\n```\n" for library, code in shown.items()]
    if small:
        blocks.append("The stem is for small images (3x3 convolution, no pooling), which timm does not have.\n")
    return "\n".join(blocks)


def training(settings):
    """All settings as a table."""
    if not settings.get("recipe"):
        return "The weights were imported; how they were trained is not recorded here.\n"
    shown = {key: value for key, value in settings.items() if key not in ("versions", "data_on_hub")}
    shown |= settings.get("versions", {})
    rows = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in shown.items()]
    return (
        "\n".join(["Pre-trained without labels, with these settings:\n", "| setting | value |", "|---|---|", *rows])
        + "\n"
    )
