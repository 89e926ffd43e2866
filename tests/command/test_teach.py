"""For teachers: notebooks without solutions, and what the teachers' page says."""

import re

import lessons
import nbformat
import yaml

from notebooks import strip


def test_strip_leaves_the_lessons_whole_but_for_their_solutions(tmp_path, capsys):
    assert strip.main([str(lessons.FOLDER), "-o", str(tmp_path / "learners")]) == 0
    written = sorted((tmp_path / "learners").glob("*.ipynb"))
    assert [path.name for path in written] == [path.name for path in lessons.LESSONS]
    assert capsys.readouterr().out.count(".ipynb") == len(written)
    for before, after in (
        (nbformat.read(a, 4), nbformat.read(b, 4)) for a, b in zip(lessons.LESSONS, written, strict=True)
    ):
        nbformat.validate(after)
        assert lessons.solutions(before) and not lessons.solutions(after)
        code = [[c.source for c in notebook.cells if c.cell_type == "code"] for notebook in (before, after)]
        assert code[0] == code[1]
        assert all(not c.outputs and c.execution_count is None for c in after.cells if c.cell_type == "code")
        text = ["\n".join(c.source for c in n.cells if c.cell_type == "markdown") for n in (before, after)]
        for heading in re.findall(r"^#+ .*$", text[0], re.MULTILINE):
            assert heading in text[1]
        assert text[0].count("<summary>Hint") == text[1].count("<summary>Hint")


def test_strip_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "bad.ipynb").write_text("no notebook")
    for source, out, words in (
        (tmp_path / "none", tmp_path / "out", "no notebooks"),
        (lessons.FOLDER, lessons.FOLDER, "holds the originals"),
        (tmp_path, tmp_path / "out", "not a notebook"),
    ):
        assert strip.main([str(source), "-o", str(out)]) == 2
        assert words in capsys.readouterr().err


def test_the_plans_add_up_to_the_hours_that_they_name():
    text = (lessons.FOLDER.parent / "TEACHING.md").read_text(encoding="utf-8")
    plans = re.findall(r"^### .*?\(([\d½]+) hours.*?\n(.*?)(?=^#)", text, re.MULTILINE | re.DOTALL)
    assert len(plans) == 3
    for hours, plan in plans:
        minutes = sum(int(n) for row in re.findall(r"^\| ([\d +]+) \|", plan, re.MULTILINE) for n in row.split("+"))
        assert minutes == 60 * (int(hours.rstrip("½")) + hours.endswith("½") / 2)


def test_the_values_file_for_kubernetes_is_whole():
    path = lessons.FOLDER.parent / "docs" / "jupyterhub-values.yaml"
    values = yaml.safe_load(path.read_text())
    user = values["singleuser"]
    assert user["storage"]["extraVolumeMounts"][0]["readOnly"] is True
    assert user["extraEnv"]["HF_HUB_OFFLINE"] == "1"
    names = [{volume["name"] for volume in user["storage"][key]} for key in ("extraVolumes", "extraVolumeMounts")]
    assert names[0] == names[1]
    # the learner's volume hides what the image has in the home folder: the notebooks are pulled into it
    assert values["hub"]["config"]["KubeSpawner"]["working_dir"] == "/home/jovyan"
    environment = yaml.safe_load((path.parent.parent / "environment.yml").read_text())
    assert "nbgitpuller" in environment["dependencies"][-1]["pip"]
