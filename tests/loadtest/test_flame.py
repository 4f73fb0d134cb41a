"""The flame graph: processes by what they do, and no path of the machine that drew it."""

from loadtest.flame import named

DRAWN = (
    '<text id="title" x="50%" y="24.00">/home/me/bin/py-spy record --pid 7</text>'
    "<g><title>process 7:&quot;/home/me/python -m app serve&quot; (6,106 samples, 100.00%)</title>"
    '<rect x="0%" y="1"/><text x="0.25%" y="2">process 7:&quot;/home/me/python -m app serve&quot;</text></g>'
    "<g><title>process 9:&quot;/home/me/python -c from forkserver import main (97 samples, 1.59%)</title>"
    '<rect x="0%" y="3"/><text x="0.25%" y="4">pr..</text></g>'
    "<g><title> main(16, [&apos;/home/me&apos;])&quot; (97 samples, 1.59%)</title>"
    '<rect x="0%" y="5"/><text x="0.25%" y="6"> main(16, [..</text></g>'
    "<g><title>process 8:&quot;/home/me/python -c from forkserver import main (2,605 samples, 42.66%)</title>"
    '<rect x="0%" y="3"/><text x="0.25%" y="4">process 8:&quot;/ho..</text></g>'
    "<g><title>search (app/stages/retrieval.py:63) (80 samples, 1.31%)</title>"
    '<rect x="0%" y="7"/><text x="0.25%" y="8">sea..</text></g>'
)


def test_processes_are_named_by_what_they_do_and_no_path_is_left():
    drawn = named(DRAWN, {7: "service", 8: "worker 0"})
    assert "/home" not in drawn
    assert "<title>service (6,106 samples, 100.00%)</title>" in drawn
    assert ">worker 0</text>" in drawn
    assert "<title>server of forks (97 samples, 1.59%)</title>" in drawn
    assert '<text x="0.25%" y="4"></text>' in drawn  # its cell is too narrow for its name
    assert "<title>forked (97 samples, 1.59%)</title>" in drawn
    assert drawn.endswith('<text x="0.25%" y="8">sea..</text></g>')  # what isn't a process stays as it is
    assert drawn.count("</g>") == DRAWN.count("</g>")
