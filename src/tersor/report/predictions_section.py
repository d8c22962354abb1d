"""What the networks answer: softened targets, images whose answer changed, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.report.charts import columns
from tersor.report.summary import Numbers
from tersor.report.templates import Markup, picture, signed, table, tag

Evidence = Mapping[str, Any]

_MATRIX_CLASSES = 20
_ROWS = 20


def class_name(numbers: Numbers, number_: int) -> str:
    """The name of a class, or its number where the data has no name for it."""
    names = numbers.get("classes") or ()
    return str(names[number_]) if number_ < len(names) else f"class {number_}"


def targets(numbers: Numbers, evidence: Evidence) -> Markup:
    """Softened targets of a few images, over the temperature."""
    told = evidence["targets"]
    return tag(
        "section",
        tag("h2", "Softened targets"),
        tag(
            "p",
            f"softmax(logits / T) of the {told['of']}, on test images from the one that it is surest of to the one "
            "that it is least sure of. A higher temperature T shows what it holds the image for besides; the entropy "
            "says how much, in bits.",
        ),
        tag("div", *[_target(numbers, image) for image in told["images"]], class_="grid wide"),
    )


def similar(numbers: Numbers, evidence: Evidence) -> Markup:
    """Which wrong classes the teacher finds near to the right one."""
    told = evidence["targets"]["similar"]
    if not told["rows"]:
        return Markup("")
    classes = range(len(told["rows"][0][1]))
    wrong = {(label, other): row[other] for label, row in told["rows"] for other in classes if other != label}
    most = max(wrong.values())
    nearest = sorted(wrong, key=lambda pair: -wrong[pair])[:3]
    pairs = ", ".join(f"{class_name(numbers, of)} for {class_name(numbers, other)}" for of, other in nearest)
    rows = [
        [class_name(numbers, label), *[_share(row[other], label == other, most) for other in classes]]
        for label, row in told["rows"]
    ]
    head = ["is ↓ held for →", *[class_name(numbers, each) for each in classes]]
    return tag(
        "section",
        tag("h2", "What it finds alike"),
        tag(
            "p",
            f"Mean of softmax(logits / {told['temperature']:g}) of the {evidence['targets']['of']} over "
            f"{told['images']:,} test images, in percent. Most of what is wrong: {pairs}.",
        ),
        table(head, rows, caption="Mean softened answer by class", class_="matrix"),
    )


def _share(probability: float, right: bool, most: float) -> Markup:
    heat = 0 if right else int(-(-4 * probability // most)) if most else 0
    return tag("td", f"{100 * probability:.1f}", class_=f"heat{heat}")


def attention(numbers: Numbers, evidence: Evidence) -> Markup:
    """Where the networks look, on a few images."""
    told = evidence["attention"]
    if not told["layers"]:
        return Markup("")
    names = list(told["layers"])
    most = max(len(layers) for layers in told["layers"].values())
    rows: list[list[str]] = []
    for image in told["images"]:
        label = class_name(numbers, image["label"])
        for name in names:
            cells = [
                tag("td", picture(found, alt=f"{name}, {layer}", title=f"{name}, {layer}"))
                for found, layer in zip(image["maps"][name], told["layers"][name], strict=True)
            ]
            first = tag("td", _image(image, label)) if name == names[0] else tag("td", "")
            rows.append([f"{label}: {name}", first, *cells, *[tag("td", "")] * (most - len(cells))])
    layers = "; ".join(f"{name}: {', '.join(paths)}" for name, paths in told["layers"].items())
    return tag(
        "section",
        tag("h2", "Where they look"),
        tag(
            "p",
            "Mean over the channels of a layer's squared output, in the last layer at each resolution, from black, its "
            f"least, to white, its most. {layers}.",
        ),
        table(["image", "", *[f"resolution {place + 1}" for place in range(most)]], rows, caption="Attention maps"),
    )


def _target(numbers: Numbers, image: Mapping[str, Any]) -> Markup:
    names = [class_name(numbers, each) for each in image["classes"]]
    label = class_name(numbers, image["label"])
    lines: list[Markup] = []
    for row in image["rows"]:
        likeliest = sorted(zip(row["probabilities"], names, strict=True), reverse=True)[:3]
        told = f"T = {row['temperature']}: " + ", ".join(f"{name} {value:.3f}" for value, name in likeliest)
        groups = [(name, {"teacher": value}) for name, value in zip(names, row["probabilities"], strict=True)]
        lines += [
            tag("div", f"T = {row['temperature']}"),
            columns(groups, told, height=34),
            tag("div", f"{row['entropy']:.2f} bits", class_="amount"),
        ]
    axis = tag("div", *[tag("span", name, title=name) for name in names], class_="names")
    head = tag("div", _image(image, label), tag("h4", label, tag("small", f"image {image['index']}")), class_="about")
    return tag("figure", head, tag("div", *lines, axis, class_="rows"))


def _image(image: Mapping[str, Any], label: str) -> Markup:
    return picture(image["png"], alt=f"test image {image['index']}, labelled {label}")


def answers(numbers: Numbers, evidence: Evidence) -> Markup:
    """Agreement, the changed images, and what became of each class: original against artifact."""
    told = evidence["answers"]
    changed = told["lost"] + told["gained"] + told["other"]
    summary = (
        f"The artifact gives {told['agreement']:.2f} % of the original's answers (float32) to {told['images']:,} test "
        f"images. Of the {changed:,} that changed, {told['lost']:,} were right and are wrong now, {told['gained']:,} "
        f"were wrong and are right now, {told['other']:,} are wrong in another way."
    )
    return tag(
        "section",
        tag("h2", "Answers that changed"),
        tag("p", summary),
        tag("div", *[_changed(numbers, image) for image in told["shown"]], class_="images"),
        _classes(numbers, told["classes"]),
        _moves(numbers, told["moves"]),
    )


def _changed(numbers: Numbers, image: Mapping[str, Any]) -> Markup:
    label, before, after = (class_name(numbers, image[key]) for key in ("label", "before", "after"))
    kind = "lost" if image["before"] == image["label"] else "gained" if image["after"] == image["label"] else "other"
    told = {"lost": "− lost", "gained": "+ gained", "other": "still wrong"}[kind]
    return tag(
        "figure",
        _image(image, label),
        tag("figcaption", tag("b", told, class_=kind), tag("span", f"{before} → {after}"), tag("small", f"is {label}")),
        title=f"image {image['index']}: labelled {label}, original {before}, artifact {after}",
    )


def _classes(numbers: Numbers, classes: Sequence[Mapping[str, Any]]) -> Markup:
    ordered = sorted(classes, key=lambda each: (each["after"] - each["before"]) / each["images"])
    shown = ordered if len(ordered) <= _MATRIX_CLASSES else ordered[: _ROWS // 2] + ordered[-_ROWS // 2 :]
    rows = []
    for each in shown:
        before, after = (100 * each[key] / each["images"] for key in ("before", "after"))
        change = tag(
            "td",
            signed(after - before, "", 1),
            class_=None if after == before else "lost" if after < before else "gained",
        )
        name = class_name(numbers, each["class"])
        rows.append([name, f"{each['images']:,}", f"{before:.1f}", f"{after:.1f}", change])
    which = "Every class" if shown is ordered else f"The {_ROWS} classes that changed most"
    return tag(
        "div",
        tag("h3", f"{which}, from what lost most"),
        table(["class", "images", "original, %", "artifact, %", "points"], rows, caption="Accuracy of each class"),
    )


def _moves(numbers: Numbers, moves: Sequence[Sequence[int]]) -> Markup:
    involved = sorted({number_ for old, new, _ in moves for number_ in (old, new)})
    if not involved:
        return Markup("")
    title = tag("h3", "From which answer to which")
    if len(involved) > _MATRIX_CLASSES:
        rows = [[class_name(numbers, old), class_name(numbers, new), str(count)] for old, new, count in moves[:_ROWS]]
        return tag("div", title, table(["original", "artifact", "images"], rows, caption="The most frequent changes"))
    counts = {(old, new): count for old, new, count in moves}
    most = max(counts.values())
    rows = [
        [class_name(numbers, old), *[_cell(counts.get((old, new), 0), most) for new in involved]] for old in involved
    ]
    head = ["original ↓ artifact →", *[class_name(numbers, each) for each in involved]]
    return tag(
        "div", title, table(head, rows, caption="Images by the original's and the artifact's answer", class_="matrix")
    )


def _cell(count: int, most: int) -> Markup:
    heat = -(-4 * count // most)  # 1 to 4, 0 for none
    return tag("td", f"{count:,}" if count else "·", class_=f"heat{heat}")
