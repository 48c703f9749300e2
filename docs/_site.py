"""Makes pages of the site from README, the examples and the public names.

mkdocs calls these functions (`hooks` in mkdocs.yml); `make docs` runs it.
"""

import ast
import importlib.util
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
# Rooms in the order of the navigation, with their titles.
ROOMS = {
    "adversarial": "Adversarial training",
    "quantization": "VQ-VAE",
    "hsic": "HSIC",
    "transport": "EMD, WMD, WRD",
    "theseus": "BERT-of-Theseus",
    "pretraining": "ALBERT and ELECTRA",
    "denoising": "Denoising, energy models",
    "nvae": "NVAE",
}
NOTEBOOKS = importlib.util.module_from_spec(
    importlib.util.spec_from_file_location(
        "notebooks", ROOT / "docs/_notebooks.py"
    )
)
NOTEBOOKS.__spec__.loader.exec_module(NOTEBOOKS)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_config(config):
    """The navigation, of the pages that there are."""
    methods = [
        {title: f"{room}.md"}
        for room, title in ROOMS.items()
        if (ROOT / "docs" / f"{room}.md").exists()
    ]
    groups = {
        name: [
            {ROOMS.get(path.stem, path.stem): f"{name}/{path.name}"}
            for path in sorted((ROOT / "docs" / name).glob("*.md"))
        ]
        for name in ("results", "benchmarks")
    }
    config.nav = [
        {"Start": "index.md"},
        {"Methods": methods},
        {"bert4keras scripts": "bert4keras.md"},
        {"Saved models": "saving.md"},
        {"Examples": "gallery.md"},
        {
            "Notebooks": [
                {name.removeprefix("basic_"): f"notebooks/{name}.md"}
                for name in NOTEBOOKS.examples()
            ]
        },
        {"Posts": "posts.md"},
        {"API": [{title: f"api/{room}.md"} for room, title in names_by_room()]},
        {"Results": [{"Headlines": "results.md"}, *groups["results"]]},
        {"Benchmarks": groups["benchmarks"]},
        {"Changelog": "changelog.md"},
    ]
    extra = ROOT / "docs/scaling.md"
    if extra.exists():
        config.nav.insert(3, {"Scaling": extra.name})
    return config


def on_files(files, config):
    """Adds the pages that are built from other files."""
    pages = {
        "index.md": (ROOT / "README.md").read_text("utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
        "gallery.md": gallery(),
        "posts.md": posts(),
    }
    chinese = ROOT / "README.zh-CN.md"
    if chinese.exists():
        pages["zh.md"] = chinese.read_text("utf-8")
        config.nav.append({"中文": "zh.md"})
    for room, names in public_names().items():
        lines = [f"# {title_of(room)}: every public name", ""]
        for name in names:
            lines += [f"::: {name}", ""]
        pages[f"api/{room}.md"] = "\n".join(lines)
    for name in NOTEBOOKS.examples():
        pages[f"notebooks/{name}.md"], figures = NOTEBOOKS.page(name)
        pages |= {f"notebooks/{uri}": image for uri, image in figures.items()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that leave the folder of the pages lead to their pages here."""
    here = posixpath.dirname(page.file.src_uri)
    from_root = page.file.src_uri in ("index.md", "changelog.md", "zh.md")

    def moved(match):
        target = match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        base = "" if from_root else posixpath.join("docs", here)
        path = posixpath.normpath(posixpath.join(base, path))
        if path.startswith("examples/"):
            new, anchor = "gallery.md", pathlib.PurePath(path).stem
        elif path == "docs/notebooks":
            new = f"notebooks/{next(iter(NOTEBOOKS.examples()))}.md"
        elif path == "docs/benchmarks":
            new = "benchmarks/adversarial.md"
        elif path == "README.md":
            new = "index.md"
        elif path == "README.zh-CN.md":
            new = "zh.md"
        elif path == "CHANGELOG.md":
            new = "changelog.md"
        elif path.startswith("docs/"):
            new = path[len("docs/") :]
        else:
            return match[0]
        new = posixpath.relpath(new, here or ".")
        return match[1] + new + (f"#{anchor}" if anchor else "") + match[3]

    return LINK.sub(moved, markdown)


def public_names():
    """`{room: names}` as `blogkeras/__init__.py` imports them."""
    tree = ast.parse((ROOT / "blogkeras/__init__.py").read_text("utf-8"))
    rooms = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            room = node.module.split(".")[1]
            room = room if room in ROOMS else "hall"
            names = rooms.setdefault(room, [])
            # By the room: `blogkeras.hsic` is the function for Python, and the
            # room for who reads the files.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    order = [*ROOMS, "hall"]
    return {room: rooms[room] for room in order if room in rooms}


def title_of(room):
    return ROOMS.get(room, "Shared by the rooms")


def names_by_room():
    return [(room, title_of(room)) for room in public_names()]


def gallery():
    """Each example: what it does, its figure, its source."""
    lines = [
        "# Examples",
        "",
        "`basic_*.py` take seconds, `task_*.py` a real data set. Each is one "
        "file: `python examples/NAME.py --help` shows its options.",
        "",
    ]
    figures = {
        name: path.relative_to(ROOT / "docs").as_posix()
        for path in sorted((ROOT / "docs").glob("*.png"))
        for name in [path.name]
    }
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text("utf-8")
        text = ast.get_docstring(ast.parse(source))
        lines += [f"## {path.stem}", "", text or "", ""]
        if path.stem in NOTEBOOKS.examples():
            page = f"notebooks/{path.stem}.md"
            lines += [f"[Part by part, with its outputs]({page})", ""]
        lines += [
            f"![{path.stem}]({uri})\n"
            for name, uri in figures.items()
            if belongs(name, path.stem)
        ]
        lines += ['??? note "Source"', "", "    ```python"]
        lines += ["    " + line for line in source.splitlines()]
        lines += ["    ```", ""]
    return "\n".join(lines)


def belongs(figure, example):
    """Whether a page says that this example draws the figure."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    drawn = re.compile(rf"{example}\.py[^`]*{re.escape(figure)}")
    stem = example.split("_", 1)[1]
    return figure == f"{stem}.png" or any(
        drawn.search(page.read_text("utf-8")) for page in pages
    )


def posts():
    """The blog's posts by number, from README's table, one section each."""
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in readme.splitlines()
        if line.startswith("| [") and "kexue.fm" in line
    ]
    lines = [
        "# The blog's posts by number",
        "",
        "Scientific Spaces (科学空间), by Su Jianlin (苏剑林).",
        "",
    ]
    for row in sorted(rows, key=number_of):
        number, title = number_of(row), row[0].partition(") ")[2]
        lines += [
            f"## {number} {title}",
            "",
            f"{row[1]}: {row[2]}",
            "",
            f"- [the post](https://kexue.fm/archives/{number})",
            f"- here: {row[4]}",
            f"- examples: {row[3]}",
            *(
                f"- {kind}: {', '.join(f'`{path}`' for path in paths)}"
                for kind, paths in sources_of(number).items()
                if paths
            ),
            "",
        ]
    return "\n".join(lines).replace("](docs/", "](")


def number_of(row):
    return int(re.search(r"\[(\d+)\]", row[0])[1])


def sources_of(number):
    """The files of code, tests and benchmarks that name a post."""
    return {
        folder: [
            path.relative_to(ROOT).as_posix()
            for path in sorted((ROOT / folder).rglob("*.py"))
            if str(number) in path.read_text("utf-8")
        ]
        for folder in ("blogkeras", "tests", "benchmarks")
    }
