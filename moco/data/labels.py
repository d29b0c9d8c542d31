"""Labels: whether there are any, how many classes they make, and whether those of two splits mean the same."""

from accelerate import PartialState

from moco.errors import UserError

MAX_CLASSES = 1_000_000  # larger numbers are not labels


def label_kind(dataset):
    """The type of the labels in a word, "int64" or such where they are whole numbers."""
    feature = dataset.features.get("label")
    return str(getattr(feature, "dtype", type(feature).__name__))


def has_labels(dataset):
    """Whether each image has a whole number from 0 on as its label, as far as can be told without reading."""
    if not label_kind(dataset).startswith(("int", "uint")):
        return False
    found = dataset.label_range()
    return found is None or 0 <= found[0] <= found[1] < MAX_CLASSES


def monitor_test_set(train_set, test_set, name):
    """The test set if its labels mean what training's do, or training has none; otherwise None.

    If that is a surprise, why is printed.
    """
    if test_set is None or not has_labels(train_set):
        return test_set
    if not has_labels(test_set):
        return None
    if class_names(train_set) != class_names(test_set):
        if PartialState().is_main_process:
            print(
                f"data    {name}: the test split names other classes than training, or in another order, so the kNN"
                " monitor looks at held-out training images instead"
            )
        return None
    return test_set


def class_names(dataset):
    """The names of the classes, or None: a list, though a split that was just drawn has a tuple."""
    names = getattr(dataset.features["label"], "names", None)
    return None if names is None else list(names)


def count_classes(train_set, test_set, name):
    """The number of classes. Raises UserError if images have no labels that a classifier could learn."""
    if "label" not in train_set.column_names:
        raise UserError(f"--data {name} has no labels, which a linear probe needs; --label-column may name a column")
    if test_set is not None and "label" not in test_set.column_names:
        raise UserError(f"--data {name} has labels for training but none for validation; both must have them")
    splits = [split for split in (train_set, test_set) if split is not None]
    names = [class_names(split) for split in splits]
    if names[0] != names[-1]:
        raise UserError(
            f"--data {name}: training (with {len(names[0] or ())} named classes) and validation"
            f" ({len(names[-1] or ())}) must name the same classes in the same order"
        )
    for split in splits:
        kind = label_kind(split)
        if not kind.startswith(("int", "uint")):
            raise UserError(f"--data {name} has labels of type {kind}; they must be integers from 0")
    ranges = [split.label_range() for split in splits]
    if None in ranges and not names[0]:
        raise UserError(
            f"--data {name} names no classes, and its files do not say in their footers how many labels there are;"
            " --no-streaming downloads them, and counts"
        )
    known = [found for found in ranges if found]
    low, high = min((low for low, _ in known), default=0), max((high for _, high in known), default=0)
    classes = len(names[0]) if names[0] else high + 1
    if classes > MAX_CLASSES:
        raise UserError(f"--data {name} has labels up to {high}; {MAX_CLASSES} classes are the most")
    if low < 0 or high >= classes:
        raise UserError(
            f"--data {name} has labels from {low} to {high} for {classes} classes: some images are not labelled"
        )
    return classes
