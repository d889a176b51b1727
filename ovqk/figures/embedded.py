"""A figure as an SVG element inside a page: small, without ids, in the page's fonts and its theme's colours.

Matplotlib writes a whole file: its own font, fixed colours, a style sheet that would reach the whole page, ids that
other figures use too, and an element for each dot. Here colours become the page's variables (`theme`), a series' dots
become one path, every mark that is used twice is written out, and an artist's `gid` becomes `data-part`.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import matplotlib
from matplotlib.figure import Figure

from ovqk.figures.colours import CATEGORIES, CATEGORIES_DARK
from ovqk.figures.drawing import FAINT, INK, LINE, MUTED, STYLE

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
OF_PAGE = {INK: "--ink", MUTED: "--muted", LINE: "--line", FAINT: "--faint", "#ffffff": "--ground"}
"""A colour in figures -> the variable in the page's style that is this colour on a light ground."""
OF_FIGURES = {colour: (f"--line-{place}", CATEGORIES_DARK[place]) for place, colour in enumerate(CATEGORIES)}
"""A line's colour -> its variable, and its colour on a dark ground."""
NUMBER = re.compile(r"-?\d+\.\d+")
COLOUR = re.compile(r"#[0-9a-f]{6}")
PART = re.compile(r"[a-z]+-\d+")
"""An artist's id is kept if it has this form."""
UNUSED = ("font", "stroke-linejoin", "stroke-linecap", "stroke-miterlimit")


def theme(dark: bool) -> str:
    """Return declarations for the lines' colours in a page's style."""
    return " ".join(f"{name}: {other if dark else light};" for light, (name, other) in OF_FIGURES.items())


def element(figure: Figure, label: str) -> str:
    """Return a figure as the text of one `svg` element with the class `plot`, 72 pixels to the inch.

    Args:
        figure: the figure. Its texts may not come from a record, because they become part of the page's markup.
        label: a sentence that describes the figure.
    """
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    defined = {f"#{node.get('id')}": node for node in root.iter() if node.get("id")}
    width, height = root.get("viewBox", "0 0 0 0").split()[2:]
    made = ElementTree.Element("svg", {
        "xmlns": SVG.strip("{}"),
        "class": "plot", "viewBox": f"0 0 {_short(width)} {_short(height)}", "width": _short(width),
        "height": _short(height), "role": "img", "aria-label": label, "fill": "none", "stroke-linejoin": "round",
    })  # fmt: skip
    for node in _drawn(root, defined):
        made.append(node)
    return ElementTree.tostring(made, encoding="unicode")


def _drawn(group: ElementTree.Element, defined: dict[str, ElementTree.Element]) -> Iterator[ElementTree.Element]:
    """Yield a group's paths and texts, and a separate group for each artist whose id is kept."""
    dots: dict[tuple[str, str], ElementTree.Element] = {}
    for node in group:
        tag = node.tag.removeprefix(SVG)
        if tag == "g":
            inside = list(_drawn(node, defined))
            if inside and PART.fullmatch(node.get("id", "")):
                part = ElementTree.Element("g", {"data-part": node.get("id", "")})
                part.extend(inside)
                yield part
            else:
                yield from inside
        elif tag == "use":
            shape = defined[node.get(LINK, "")]
            style = node.get("style") or shape.get("style") or ""
            where = f"{_short(node.get('x', '0'))} {_short(node.get('y', '0'))}"
            radius = _radius(shape.get("d", ""))
            if radius is None:
                yield _path(shape.get("d", ""), style, f"translate({where})")
                continue
            key = (str(radius), style)
            if key in dots:
                dots[key].set("d", f"{dots[key].get('d')}M{where}h0")
            else:
                dots[key] = ElementTree.Element("path", {"d": f"M{where}h0", "style": _round(key[1], radius)})
                yield dots[key]
        elif tag == "path":
            yield _path(node.get("d", ""), node.get("style", ""))
        elif tag == "text":
            text = ElementTree.Element("text", {"style": _text_style(node.get("style", ""))})
            text.text = node.text
            turned = re.search(r"rotate\((-?\d+)", node.get("transform", ""))
            x, y = _short(node.get("x", "0")), _short(node.get("y", "0"))
            if turned and int(turned[1]):
                text.set("transform", f"translate({x} {y}) rotate({turned[1]})")
            else:
                text.set("x", x)
                text.set("y", y)
            yield text


def _path(d: str, style: str, transform: str | None = None) -> ElementTree.Element:
    found = {"d": NUMBER.sub(lambda match: _short(match[0]), " ".join(d.split())), "style": _style(style)}
    return ElementTree.Element("path", found | ({"transform": transform} if transform else {}))


def _radius(d: str) -> float | None:
    """Return a mark's radius if it is a disc about its place, which Matplotlib draws as eight arcs."""
    numbers = [abs(float(number)) for number in NUMBER.findall(d)]
    return max(numbers) if d.count("C") == 8 else None


def _declared(style: str) -> dict[str, str]:
    return {
        name.strip(): value.strip() for name, _, value in (part.partition(":") for part in style.split(";")) if value
    }


def _style(style: str) -> str:
    kept = {name: value for name, value in _declared(style).items() if name not in UNUSED}
    if kept.get("fill") == "none":
        del kept["fill"]
    if "stroke" not in kept and "fill" not in kept and "fill: none" not in style:
        kept["fill"] = INK  # a path's initial colour
    return COLOUR.sub(_of_theme, ";".join(f"{name}:{value}" for name, value in kept.items()))


def _round(style: str, radius: float) -> str:
    """Return a style that draws a path's points as round ends, which are discs with this radius."""
    found = _declared(style)
    width = 2 * radius + (float(found.get("stroke-width", 1)) if found.get("stroke", "none") != "none" else 0)
    opacity = f";stroke-opacity:{found['fill-opacity']}" if "fill-opacity" in found else ""
    colour = COLOUR.sub(_of_theme, found.get("fill", INK))
    return f"stroke:{colour};stroke-width:{width:.1f};stroke-linecap:round{opacity}"


def _text_style(style: str) -> str:
    found = _declared(style)
    size = re.search(r"[\d.]+px", found.get("font", found.get("font-size", "")))
    parts = {"font-size": size[0] if size else "12px", "fill": found.get("fill", INK)}
    parts |= {name: found[name] for name in ("text-anchor",) if name in found}
    return COLOUR.sub(_of_theme, ";".join(f"{name}:{value}" for name, value in parts.items()))


def _of_theme(match: re.Match[str]) -> str:
    colour = match[0]
    if colour in OF_PAGE:
        return f"var({OF_PAGE[colour]})"
    return f"var({OF_FIGURES[colour][0]})" if colour in OF_FIGURES else colour


def _short(number: str) -> str:
    """Return a number with one decimal, or without it if it is zero."""
    return f"{float(number.removesuffix('pt')):.1f}".removesuffix(".0")
