"""The study: its server and its page as a browser and as an attacker meet them, the votes that it keeps, and the page that is a file."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import re
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
from PIL import Image

from lib_dynfuse import cli
from lib_dynfuse.evaluate import votes
from lib_dynfuse.evaluate.folder import EvaluationError
from lib_dynfuse.evaluate.results import study_result, study_text
from lib_dynfuse.evaluate.study.draws import Setup, draw, key_of, usable
from lib_dynfuse.evaluate.study.page import Hidden, file_page
from lib_dynfuse.evaluate.study.returned import read_back
from lib_dynfuse.evaluate.study.server import LONGEST_BODY, Server, Study
from lib_dynfuse.evaluate.trials import open_trials
from tests.evaluate.folders import METHODS, method_of, plain_folder


class Browser:
    """Requests as the study's own page makes them."""

    def __init__(self, port):
        self.port = port

    def ask(self, method, path, body=None, **headers):
        """(status, headers, content); a header that is None is left out, "_" in names stands for "-"."""
        own = {"Host": f"127.0.0.1:{self.port}"}
        if method == "POST":
            own |= {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        if method == "POST":
            own.setdefault("Content-Length", str(len(content)))
        for name, value in own.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(content or None)
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read()
        connection.close()
        return found

    def post(self, path, **body):
        status, _, content = self.ask("POST", path, body)
        assert status == 200, content
        return json.loads(content)

    def methods(self, question):
        """Whose pictures a question shows, by their pixels."""
        return [method_of(Image.open(io.BytesIO(self.ask("GET", path)[2]))) for path in question["pictures"]]


@contextmanager
def serving(folder, **setup):
    trials, methods = open_trials(folder)
    server = Server(Study(folder, trials, Setup(setup.pop("methods", methods), **setup), Hidden(folder).study), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Browser(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def folder(tmp_path):
    return plain_folder(tmp_path / "pictures")


def test_a_vote_is_for_the_method_whose_picture_was_chosen(folder):
    with serving(folder, pictures=4) as browser:
        begun = browser.post("/begin", participant=None, name="Anna")
        expected = []
        for number, question in enumerate(begun["questions"]):
            shown = browser.methods(question)
            assert sorted(shown) == sorted(METHODS)
            browser.post("/vote", participant=begun["participant"], number=number, place=number % 4, seconds=2)
            expected.append((tuple(shown), shown[number % 4]))
    (ballot,) = votes.read_ballots(folder)
    assert (ballot.kind, ballot.voter) == ("study", "Anna")
    assert [(vote.shown, vote.chosen) for vote in ballot.votes] == expected
    assert len({(vote.pair, vote.seed) for vote in ballot.votes}) == 6


def test_nothing_that_the_page_gets_tells_the_method(folder):
    with serving(folder, pictures=4, always="klora") as browser:
        texts = [browser.ask("GET", path)[2] for path in ("/", "/page.css", "/page.js")]
        begun = browser.post("/begin", participant=None, name="")
        texts.append(json.dumps(begun).encode())
        for question in begun["questions"]:
            for path in (*question["pictures"], *question["subject"], *question["style"]):
                status, headers, content = browser.ask("GET", path)
                assert (status, headers["Content-Type"]) == (200, "image/png")
                texts += [content, str(headers).encode()]
    for text in texts:
        assert not [method for method in METHODS if method.encode() in text]


def test_who_comes_back_finds_the_same_questions_and_the_answers(folder):
    with serving(folder) as browser:
        begun = browser.post("/begin", participant=None, name="Anna")
        who = begun["participant"]
        browser.post("/vote", participant=who, number=0, place=1, seconds=1)
        browser.post("/vote", participant=who, number=2, place=None, seconds=1)
    with serving(folder, pictures=3) as browser:
        again = browser.post("/begin", participant=who, name="somebody else")
        assert again["name"] == "Anna"
        assert [question["pictures"] for question in again["questions"]] == [question["pictures"] for question in begun["questions"]]
        assert [(question["answered"], question["place"]) for question in again["questions"]][:4] == [
            (True, 1), (False, None), (True, None), (False, None),
        ]  # fmt: skip
        browser.post("/vote", participant=who, number=0, place=0, seconds=1)
    (ballot,) = votes.read_ballots(folder)
    assert [(vote.chosen and vote.shown.index(vote.chosen)) for vote in ballot.votes] == [0, None]


def test_many_participants_at_once_lose_no_vote(folder):
    with serving(folder) as browser:

        def take_part(place):
            who = browser.post("/begin", participant=None, name=f"number {place}")["participant"]
            for number in range(6):
                browser.post("/vote", participant=who, number=number, place=place % 2, seconds=0.5)

        threads = [threading.Thread(target=take_part, args=(place,)) for place in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    ballots = votes.read_ballots(folder)
    assert sorted(ballot.voter for ballot in ballots) == [f"number {place}" for place in range(6)]
    for ballot in ballots:
        places = [vote.shown.index(vote.chosen) for vote in ballot.votes]
        assert places == [int(ballot.voter[-1]) % 2] * 6


def test_one_participant_in_two_windows_loses_no_vote(folder):
    with serving(folder) as browser:
        who = browser.post("/begin", participant=None, name="")["participant"]
        threads = [
            threading.Thread(target=browser.post, args=("/vote",), kwargs={"participant": who, "number": n, "place": 1, "seconds": 0})
            for n in range(6)
        ]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert len(votes.read_ballots(folder)[0].votes) == 6


def test_a_full_disk_is_told_and_the_votes_before_stay(folder, monkeypatch):
    with serving(folder) as browser:
        who = browser.post("/begin", participant=None, name="")["participant"]
        browser.post("/vote", participant=who, number=0, place=1, seconds=0)
        with monkeypatch.context() as full:
            full.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            status, _, content = browser.ask("POST", "/vote", {"participant": who, "number": 1, "place": 1, "seconds": 0})
            assert (status, content) == (507, b"This could not be saved: No space left on device.")
        assert len(votes.read_ballots(folder)[0].votes) == 1
        browser.post("/vote", participant=who, number=1, place=1, seconds=0)
    assert len(votes.read_ballots(folder)[0].votes) == 2
    assert not list((folder / "votes").glob("*.part"))


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": None},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:PORT"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_other_sites_get_nothing_and_change_nothing(folder, headers):
    with serving(folder) as browser:
        who = browser.post("/begin", participant=None, name="")["participant"]
        headers = {name: value and value.replace("PORT", str(browser.port)) for name, value in headers.items()}
        vote = {"participant": who, "number": 0, "place": 0, "seconds": 0}
        assert browser.ask("POST", "/vote", vote, **headers)[0] == 403
        assert browser.ask("GET", f"/pictures/{who}/0/picture/0", **headers)[0] == 403
    assert votes.read_ballots(folder)[0].votes == ()


def test_a_vote_without_an_origin_is_refused_and_localhost_is_this_machine_too(folder):
    with serving(folder) as browser:
        assert browser.ask("POST", "/begin", {"participant": None, "name": ""}, Origin=None)[0] == 403
        own = {"Host": f"localhost:{browser.port}", "Origin": f"http://localhost:{browser.port}"}
        assert browser.ask("POST", "/begin", {"participant": None, "name": ""}, **own)[0] == 200


def test_the_server_listens_on_this_machine_only(folder):
    trials, methods = open_trials(folder)
    with Server(Study(folder, trials, Setup(methods), "x"), 0) as server:
        assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    [
        "/../pictures", "/etc/passwd", "/..%2f..%2fetc/passwd", "/pictures/../../votes/study.key", "/votes/study.key", "/page.css/..",
        "/pictures/WHO/0/picture/9", "/pictures/WHO/-1/picture/0", "/pictures/WHO/99/picture/0", "/pictures/WHO/0/subject/1",
        "/pictures/WHO/0/../picture/0", "/pictures/WHO/0/prompt/0", "/pictures/../0/picture/0", "/pictures/..%2fx/0/picture/0",
        "/pictures/0123456789abcdef0123456789abcdef/0/picture/0", "/pictures/WHO/\u0661/picture/0", "//evil.example/", "/?x",
        "http://evil.example/",
    ],
)  # fmt: skip
def test_no_path_leads_anywhere_else(folder, path):
    with serving(folder) as browser:
        who = browser.post("/begin", participant=None, name="")["participant"]
        path = path.replace("WHO", who).encode("utf-8").decode("latin-1")
        connection = http.client.HTTPConnection("127.0.0.1", browser.port, timeout=10)
        connection._encode_request = lambda request: request.encode("latin-1")  # paths that no browser sends
        connection.request("GET", path, headers={"Host": f"127.0.0.1:{browser.port}"})
        answer = connection.getresponse()
        assert answer.status == 404
        answer.read()
        connection.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400), (b"[]", 400), (b"[" * 60000, 400), (b"9" * 5000, 400), (b"\xff", 400),
        ({"participant": "../../x", "number": 0, "place": 0}, 400),
        ({"participant": None, "number": 0, "place": 0}, 400),
        ({"participant": "WHO", "number": "0", "place": 0}, 400),
        ({"participant": "WHO", "number": True, "place": 0}, 400),
        ({"participant": "WHO", "number": 0, "place": 2}, 400),
        ({"participant": "WHO", "number": 0, "place": -1}, 400),
        ({"participant": "WHO", "number": 0, "place": 0.0}, 400),
        ({"participant": "WHO", "number": 0, "place": 0, "seconds": float("nan")}, 400),
        ({"participant": "WHO", "number": 0, "place": 0, "seconds": "1"}, 400),
        ({"participant": "WHO", "number": 99, "place": 0}, 404),
        ({"participant": "WHO", "number": 10**30, "place": 0}, 404),
        ({"participant": "f" * 32, "number": 0, "place": 0}, 404),
    ],
)  # fmt: skip
def test_what_is_no_vote_is_refused(folder, body, status):
    with serving(folder) as browser:
        who = browser.post("/begin", participant=None, name="")["participant"]
        if isinstance(body, dict):
            body = {name: who if value == "WHO" else value for name, value in body.items()}
        assert browser.ask("POST", "/vote", body)[0] == status
    assert votes.read_ballots(folder)[0].votes == ()


def test_a_request_that_is_too_long_or_of_another_kind_is_refused(folder):
    with serving(folder) as browser:
        assert browser.ask("POST", "/begin", b"", Content_Length=str(LONGEST_BODY + 1))[0] == 413
        assert browser.ask("POST", "/begin", b"", Content_Length="-1")[0] == 411
        assert browser.ask("POST", "/begin", b"", Content_Length=None)[0] == 411
        assert browser.ask("POST", "/begin", {"name": ""}, Content_Type="text/plain")[0] == 415
        assert browser.ask("POST", "/elsewhere", {})[0] == 404
        assert browser.ask("PUT", "/vote", {})[0] == 501


def test_times_are_kept_within_reason(folder):
    with serving(folder) as browser:
        who = browser.post("/begin", participant=None, name="")["participant"]
        for number, seconds in enumerate((-5, 10**400, 1.234)):
            browser.post("/vote", participant=who, number=number, place=0, seconds=seconds)
    content = json.loads(next((folder / "votes").glob("study-*.json")).read_text())
    assert [vote["seconds"] for vote in content["votes"]] == [0, 86400, 1.23]


def test_a_name_is_text_whatever_it_holds(folder):
    name = "</script><script>alert(1)</script>\u202e\n\ud800" + "x" * 500
    with serving(folder, own_question="Which <b>is</b> </script> better?") as browser:
        assert len(browser.post("/begin", participant=None, name=name)["name"]) <= 60
        page = browser.ask("GET", "/")[2].decode()
    assert "<b>" not in page
    assert "Which &lt;b&gt;is&lt;/b&gt;" in page
    assert page.count("</script>") == 2
    (voter,) = (ballot.voter for ballot in votes.read_ballots(folder))
    assert voter.isprintable()


def test_the_page_may_load_and_send_nothing_elsewhere(folder):
    with serving(folder) as browser:
        _, headers, page = browser.ask("GET", "/")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert set(re.findall(rb'(?:src|href)="([^"]*)"', page)) == {b"/page.css", b"/page.js"}


def test_pictures_that_went_away_are_no_error_of_the_server(folder):
    with serving(folder, pictures=2, methods=("direct", "klora")) as browser:
        begun = browser.post("/begin", participant=None, name="")
        for method in ("direct", "klora"):
            for path in folder.glob(f"*/{method}/*.png"):
                path.write_bytes(b"no picture")
        status, _, content = browser.ask("GET", begun["questions"][0]["pictures"][0])
        assert status == 500
        assert b"direct" not in content
        assert b"klora" not in content


def drawn(folder, seed=0, before=None, **setup):
    trials, methods = open_trials(folder)
    settings = Setup(setup.pop("methods", methods), **setup)
    return draw(usable(trials, settings), settings, before or Counter(), random.Random(seed))


def test_every_participant_gets_an_order_of_their_own_and_no_question_twice(folder):
    orders = [[key_of(asked.trial) for asked in drawn(folder, seed)] for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    assert all(len(set(order)) == 6 for order in orders)


def test_places_and_methods_are_shown_equally_often(folder):
    counts = Counter((place, method) for seed in range(150) for asked in drawn(folder, seed) for place, method in enumerate(asked.shown))
    assert set(counts) == {(place, method) for place in (0, 1) for method in METHODS}
    expected = 150 * 6 / 4
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_the_method_that_is_always_shown_stands_beside_each_other_one(folder):
    shown = [asked.shown for seed in range(30) for asked in drawn(folder, seed, always="klora")]
    assert all(len(set(pair)) == 2 and "klora" in pair for pair in shown)
    assert {method for pair in shown for method in pair} == set(METHODS)
    assert {pair.index("klora") for pair in shown} == {0, 1}


def test_questions_that_were_asked_least_come_first(folder):
    trials, _ = open_trials(folder)
    before = Counter({key_of(trial): 5 for trial in trials[2:]})
    assert {key_of(asked.trial) for asked in drawn(folder, before=before, questions=2)} == {key_of(trial) for trial in trials[:2]}


def file_votes(page, who="ab" * 16, places=None, seconds=1.5):
    """What the file's page saves for somebody who always chooses a place: places, by question, or the first; and what it showed."""
    data = json.loads(re.search(r'id="study">(.*?)</script>', page)[1])
    asked = [{"question": question["question"], "shown": question["sets"][0][::-1]} for question in data["questions"]]
    places = [0] * len(asked) if places is None else places
    answers = [{**one, "place": place, "at": "2026-01-01T00:00:00Z", "seconds": seconds} for one, place in zip(asked, places)]
    pictures = {number: url for question in data["questions"] for number, url in question["pictures"].items()}
    shown = [[method_of(picture_of(pictures[number])) for number in one["shown"]] for one in asked]
    content = {"study": data["study"], "question": data["question"], "participant": who, "name": "Bo", "began": "2026", "asked": asked}
    return {**content, "votes": answers}, shown


def picture_of(url):
    kind, _, content = url.partition(";base64,")
    assert kind == "data:image/webp"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.fixture
def page(folder):
    trials, methods = open_trials(folder)
    return file_page(trials, Setup(methods, pictures=2, always="balanced"), Hidden(folder))


def returned(folder, content, name="votes.json"):
    file = folder.parent / name
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_back(file, folder, open_trials(folder)[0], Hidden(folder))


def test_a_page_that_is_a_file_needs_nothing_else_and_names_no_method(page):
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == []
    assert not [method for method in METHODS if method in page]
    assert "default-src 'none'" in page


def test_votes_of_a_file_are_for_the_methods_whose_pictures_were_chosen(folder, page):
    content, shown = file_votes(page, places=[0, 1, None, 1, 0, 1])
    returned(folder, content)
    (ballot,) = votes.read_ballots(folder)
    assert ballot.voter == "Bo"
    assert [list(vote.shown) for vote in ballot.votes] == shown
    assert [vote.chosen for vote in ballot.votes] == [row[0 if n in (0, 4) else 1] if n != 2 else None for n, row in enumerate(shown)]


def test_a_file_that_is_read_twice_counts_once_and_a_newer_answer_replaces_an_older_one(folder, page):
    content, shown = file_votes(page)
    newer = json.loads(json.dumps(content))
    newer["votes"] = [{**newer["votes"][0], "place": 1, "at": "2026-02-01T00:00:00Z"}]
    for one in (content, newer, content):
        returned(folder, one)
    (ballot,) = votes.read_ballots(folder)
    assert [vote.chosen for vote in ballot.votes] == [shown[0][1], *[row[0] for row in shown[1:]]]


def test_votes_of_another_folder_are_refused(folder, page, tmp_path):
    content, _ = file_votes(page)
    with pytest.raises(EvaluationError, match="another folder"):
        returned(plain_folder(tmp_path / "other" / "pictures"), content)


def changed(content, **changes):
    return {**content, **changes}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"{",
        lambda content: b"[" * 100000,
        lambda content: [],
        lambda content: changed(content, participant="../../x"),
        lambda content: changed(content, votes=[{**content["votes"][0], "place": 2}]),
        lambda content: changed(content, votes=[{**content["votes"][0], "place": True}]),
        lambda content: changed(content, votes=[{**content["votes"][0], "question": "x"}]),
        lambda content: changed(content, votes=[{**content["votes"][0], "seconds": float("inf")}]),
        lambda content: changed(content, asked=[{**content["asked"][0], "shown": ["x", "y"]}], votes=[]),
        lambda content: changed(content, asked=[{**content["asked"][0], "question": "x"}], votes=[]),
    ],
)
def test_a_damaged_file_of_votes_is_refused_in_a_sentence_and_changes_nothing(folder, page, change):
    with pytest.raises(EvaluationError, match=r"votes\.json (holds no|has) votes .*\.$"):
        returned(folder, change(file_votes(page)[0]))
    assert votes.read_ballots(folder) == []


def test_the_result_has_shares_intervals_and_who_follows_the_position(folder, page):
    assert study_result(folder) is None
    for number in range(3):
        _, shown = file_votes(page)
        places = [row.index("balanced") for row in shown]
        returned(folder, file_votes(page, f"{number:032x}", places)[0], f"{number}.json")
    lazy = [1, 1, 1, 1, 1, None]
    returned(folder, {**file_votes(page, "f" * 32, lazy)[0], "name": "Lazy"})
    result = study_result(folder)
    assert (result["participants"], result["answers"], result["skipped"], result["plain_sum"]) == (4, 23, 1, "direct")
    balanced = next(method for method in result["methods"] if method["method"] == "balanced")
    chosen = 18 + sum(row[1] == "balanced" for row in shown[:5])
    assert (balanced["shown"], balanced["chosen"]) == (23, chosen)
    assert balanced["share"]["mean"] == pytest.approx(chosen / 23)
    assert balanced["share"]["low"] <= chosen / 23 <= balanced["share"]["high"]
    json.dumps(result, allow_nan=False)
    assert f"{100 * chosen / 23:.1f} %" in study_text(result)


def test_who_always_chooses_the_same_place_is_named_in_the_text(folder, page):
    returned(folder, {**file_votes(page, "f" * 32)[0], "name": "Lazy"})
    result = study_result(folder)
    assert result["followers"][0]["file"] == f"study-{'f' * 32}"
    assert [(one["voter"], one["counts"]) for one in result["followers"]] == [("Lazy", {"2": [6, 0]})]
    assert "Lazy (study-ffffffff...)" in study_text(result)


def run(capsys, *arguments):
    try:
        code = cli.main(["study", *map(str, arguments)])
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def test_the_command_writes_a_page_reads_votes_and_prints_the_result(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, folder, "--out", page, "--methods", "direct", "klora", "--size", "16")
    assert (code, "6 questions" in out) == (0, True)
    content, shown = file_votes(page.read_text("utf-8"))
    assert {method for row in shown for method in row} == {"direct", "klora"}
    (tmp_path / "votes.json").write_text(json.dumps(content))
    code, out, _ = run(capsys, folder, "--read", tmp_path / "votes.json", "--result", "--json", tmp_path / "result.json")
    assert code == 0
    assert "6 answers of Bo" in out
    assert "less direct" in out
    assert json.loads((tmp_path / "result.json").read_text()) == study_result(folder)
    assert run(capsys, plain_folder(tmp_path / "new"), "--result")[:2] == (0, "Nobody has chosen a picture yet.\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "direct", "nobody"], "nobody"),
        (["--methods", "direct"], "need as many methods"),
        (["--always", "nobody"], "nobody"),
        (["--port", "70000"], "65535"),
        (["--json", "x"], "--result"),
        (["--read", "nowhere.json"], "nowhere.json"),
        (["--pictures", "5"], "--pictures"),
        (["--questions", "0"], "less than 1"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(folder, capsys, options, words):
    code, out, sentence = run(capsys, folder, *options)
    assert (code, out, sentence.count("\n")) == (2, "", 1)
    assert words in sentence


def test_a_port_that_is_taken_is_told(folder, capsys):
    with serving(folder) as browser:
        code, _, sentence = run(capsys, folder, "--port", browser.port)
    assert code == 2
    assert f"Port {browser.port}" in sentence
    assert "--port" in sentence
