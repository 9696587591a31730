"""The confusion matrix of a model as a picture: an SVG file that any browser shows.

Pure: what a manifest says about training in, text out. A row for each true class, a column for
each predicted one; the darker a field, the greater its share of the row.
"""

import html
from collections.abc import Iterator, Sequence

from gpu_service.bundle import Training
from gpu_service.plot import label

_SIDE, _FIELD = 560, 52  # of the matrix and of a field, at most
_MOST_NUMBERS = 30  # classes; with more, fields are too small for their counts
_MARGIN, _TOP, _BELOW, _BESIDE = 20, 76, 64, 140
_LETTER, _LETTERS = 7, 18  # the width of one, about; how many of a name are shown

# Told apart by people who do not see all colours, too.
_HIT, _MISS = "#0072b2", "#d55e00"
_TEXT, _FRAME = "#333333", "#dddddd"
_DARK = 0.5  # share of a row from which a field is so dark that its count is white


def svg(training: Training, *, title: str) -> str:
    """The whole file; nothing where the training has no confusion matrix."""
    names = list(training.classes)
    if not names or len(training.confusion) != len(names):
        return ""
    left = _MARGIN + _LETTER * max(len("true ↓"), min(_LETTERS, max(map(len, names)))) + 10
    field = min(_FIELD, _SIDE / len(names))
    side = field * len(names)
    width, height = left + side + _BESIDE, _TOP + side + _BELOW
    counted = sum(map(sum, training.confusion))
    hits = sum(row[at] for at, row in enumerate(training.confusion))
    note = f"{hits:,} of {counted:,} answers are right: {hits / max(1, counted):.2%}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" font-size="12" '
        f'fill="{_TEXT}">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        label(_MARGIN, 26, title, size=16),
        label(_MARGIN, 46, note),
        *_fields(training.confusion, left=left, field=field),
        f'<rect x="{left}" y="{_TOP}" width="{side:.1f}" height="{side:.1f}" fill="none" '
        f'stroke="{_FRAME}"/>',
        *_names(training, names, left=left, field=field),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _fields(confusion: Sequence[Sequence[int]], *, left: float, field: float) -> Iterator[str]:
    """A field for each pair of classes that occurs; the others stay white."""
    for true, row in enumerate(confusion):
        for predicted, count in enumerate(row):
            if not count:
                continue
            share = count / sum(row)
            x, y = left + predicted * field, _TOP + true * field
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{field:.1f}" height="{field:.1f}" '
                f'fill="{_HIT if true == predicted else _MISS}" '
                f'fill-opacity="{0.1 + 0.8 * share:.2f}"/>'
            )
            if len(confusion) <= _MOST_NUMBERS:
                text = label(x + field / 2, y + field / 2 + 4, f"{count}", anchor="middle")
                yield f'<g fill="#ffffff">{text}</g>' if share > _DARK else text


def _names(training: Training, names: Sequence[str], *, left: float, field: float) -> Iterator[str]:
    """The true classes with their recall at the sides, the predicted ones below."""
    side = field * len(names)
    yield label(left + side / 2, _TOP + side + 44, "predicted →", anchor="middle")
    yield label(left - 10, _TOP - 10, "true ↓", anchor="end")
    yield label(left + side + 10, _TOP - 10, "recall, precision")
    if len(names) > _MOST_NUMBERS:
        return
    letters = max(1, int(field / _LETTER))
    for at, name in enumerate(names):
        middle = (at + 0.5) * field
        yield label(left - 10, _TOP + middle + 4, name[:_LETTERS], anchor="end")
        yield label(left + middle, _TOP + side + 18, name[:letters], anchor="middle")
        figures = training.classes[name]
        text = f"{figures['recall']:.1%}, {figures['precision']:.1%}"
        yield label(left + side + 10, _TOP + middle + 4, text)
