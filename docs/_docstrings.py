"""Shows the examples of docstrings as code.

They stand without indentation, as Keras writes them, which Markdown would take
for quotations.
"""

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text):
    """Puts each block that begins with `>>>` between fences."""
    lines, block = [], False
    for line in text.splitlines():
        if line.lstrip().startswith(">>>") and not block:
            indent = line[: len(line) - len(line.lstrip())]
            lines += ["", f"{indent}```pycon"]
            block = True
        elif block and not line.strip():
            lines.append(f"{indent}```")
            block = False
        lines.append(line)
    if block:
        lines.append(f"{indent}```")
    return "\n".join(lines)
