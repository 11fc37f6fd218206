"""The judge, against a small server that speaks the protocol and fails in every way in which such servers fail."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from PIL import Image

from lib_dynfuse import cli
from lib_dynfuse.evaluate.folder import EvaluationError
from lib_dynfuse.evaluate.judge import protocol
from lib_dynfuse.evaluate.judge.endpoint import Endpoint, Unanswered
from lib_dynfuse.evaluate.results import judge_results
from lib_dynfuse.evaluate.study.sheets import Sheet
from lib_dynfuse.evaluate.trials import open_trials
from lib_dynfuse.evaluate.votes import read_ballots
from tests.evaluate.folders import METHODS, method_of, plain_folder

KEY = "sk-secret-0123456789"


def completion(text, finish="stop", **message):
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 7},
    }


def images(body):
    """Title -> picture, of what was sent."""
    parts = body["messages"][0]["content"]
    found = {}
    for part, after in pairwise(parts):
        if after["type"] == "image_url":
            kind, _, content = after["image_url"]["url"].partition(";base64,")
            assert kind == "data:image/png"
            found[part["text"].rstrip(":")] = Image.open(io.BytesIO(base64.b64decode(content)))
    return found


def prefers(*methods):
    """A judge that knows what it likes: the first of these methods that it sees."""

    def answer(number, body):
        seen = {method_of(picture): title[-1] for title, picture in images(body).items() if title.startswith("Picture")}
        return json.dumps({"choice": next(seen[method] for method in methods if method in seen)})

    return answer


class Model:
    """An endpoint. answer: (the request's number from 0, its body) -> a text, a whole answer as a dict, (status, dict or bytes, headers),
    or "hang", "cut", "drop": no answer, half of one, and a connection that is closed at once."""

    def __init__(self, answer):
        self.answer, self.bodies, self.headers, self.paths = answer, [], [], []
        self.done = threading.Event()


@contextmanager
def serving(answer, key=KEY):
    model = Model(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model.bodies.append(body)
            model.headers.append(self.headers)
            model.paths.append(self.path)
            if key and self.headers["Authorization"] != f"Bearer {key}":
                found = (
                    401,
                    {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}.", "code": "invalid_api_key"}},
                    {},
                )
            elif body["model"] != "seer":
                found = (404, {"error": {"message": f"The model {body['model']} does not exist", "code": "model_not_found"}}, {})
            else:
                found = model.answer(len(model.bodies) - 1, body)
            if found == "hang":
                model.done.wait(10)
                return
            if found == "drop":
                return
            status, content, headers = found if isinstance(found, tuple) else (200, found, {})
            if isinstance(content, str) and content != "cut":
                content = completion(content)
            data = content if isinstance(content, bytes) else json.dumps(completion("A") if content == "cut" else content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if content == "cut" else data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    model.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield model
    finally:
        model.done.set()
        server.shutdown()
        thread.join()
        server.server_close()


def then(*answers):
    """These answers one after the other, the last for ever."""
    return lambda number, body: answers[min(number, len(answers) - 1)]


@pytest.fixture
def folder(tmp_path):
    return plain_folder(tmp_path / "pictures", pairs=2, seeds=2)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No endpoint of the machine's own; and the seconds that a test would wait."""
    for name in ("DYNFUSE_JUDGE_URL", "DYNFUSE_JUDGE_MODEL", "DYNFUSE_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    return []


def endpoint(model, waited=None, **more):
    return Endpoint(model.url, "seer", **{"key": KEY, "timeout": 5, "sleep": (waited if waited is not None else []).append, **more})


ASKED = [{"type": "text", "text": "Which?"}]


def test_a_question_is_asked_as_the_protocol_has_it():
    with serving(then("A")) as model:
        reply = endpoint(model, max_tokens=33).ask(ASKED)
    assert (reply.text, reply.finish, reply.refused, reply.sent, reply.received) == ("A", "stop", False, 1000, 7)
    assert model.paths == ["/v1/chat/completions"]
    assert model.bodies == [{"model": "seer", "messages": [{"role": "user", "content": ASKED}], "max_tokens": 33}]
    assert model.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_an_address_may_be_the_whole_one_and_a_key_is_not_needed_everywhere():
    with serving(then("A"), key=None) as model:
        Endpoint(f"{model.url}/chat/completions/", "seer").ask(ASKED)
    assert model.paths == ["/v1/chat/completions"]
    assert model.headers[0]["Authorization"] is None


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"error": {"message": "Slow down"}}, {}),
        (500, b"<html>", {}),
        (503, {}, {}),
        (529, {"error": {"type": "overloaded"}}, {}),
        (408, b"", {}),
        "cut",
        "drop",
        (200, b"{", {}),
        (200, b"\xff\xfe", {}),
        (200, b"[]", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": None}]}, {}),
        (200, {"error": {"message": "in the middle"}}, {}),
    ],
)
def test_what_may_be_gone_is_asked_again_with_growing_patience(fault, patient):
    with serving(then(fault, fault, fault, "B")) as model:
        assert endpoint(model, patient).ask(ASKED).text == "B"
    assert len(model.bodies) == 4
    assert [1 <= wait / 2**n <= 1.25 for n, wait in enumerate(patient)] == [True] * 3


def test_a_time_out_is_asked_again(patient):
    with serving(then("hang", "B")) as model:
        assert endpoint(model, patient, timeout=0.2).ask(ASKED).text == "B"
    assert len(patient) == 1


def test_the_endpoint_says_how_long_to_wait_but_not_for_ever(patient):
    slow = [(429, {}, {"Retry-After": value}) for value in ("7", "99999", "-3", "Wed, 21 Oct 2026 07:28:00 GMT", "nan")]
    with serving(then(*slow, "B")) as model:
        endpoint(model, patient).ask(ASKED)
    assert patient[:3] == [7, 120, 0]
    assert 8 <= patient[3] <= 10
    assert 16 <= patient[4] <= 20


def test_patience_ends(patient):
    with (
        serving(then((503, {"error": {"message": "Overloaded."}}, {}))) as model,
        pytest.raises(Unanswered, match="asked 3 times: HTTP 503, Overloaded"),
    ):
        endpoint(model, patient, retries=2).ask(ASKED)
    assert (len(model.bodies), len(patient)) == (3, 2)
    with serving(then("hang")) as model, pytest.raises(Unanswered, match=r"once: no answer in 0\.2 seconds"):
        endpoint(model, patient, retries=0, timeout=0.2).ask(ASKED)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((400, {"error": {"message": "No pictures here"}}, {}), "refuses the question .*No pictures here"),
        ((403, {}, {}), "does not allow this"),
        ((404, b"", {}), "no such address or no model seer"),
        ((429, {"error": {"message": "Pay first", "code": "insufficient_quota"}}, {}), "Pay first"),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
        ((307, b"", {"Location": "http://127.0.0.1:1/"}), "HTTP 307"),
    ],
)
def test_what_will_not_change_is_not_asked_again(fault, words, patient):
    with serving(then(fault)) as model, pytest.raises(EvaluationError, match=words) as told:
        endpoint(model, patient).ask(ASKED)
    assert not isinstance(told.value, Unanswered)
    assert (len(model.bodies), patient) == (1, [])


def test_a_wrong_key_and_a_wrong_model_are_told_without_the_key():
    with serving(then("A")) as model:
        with pytest.raises(EvaluationError, match="does not take the key") as told:
            endpoint(model, key="sk-wrong-987654321").ask(ASKED)
        assert "sk-wrong" not in str(told.value)
        assert "[key]" in str(told.value)
        with pytest.raises(EvaluationError, match="no model reader"):
            Endpoint(model.url, "reader", KEY).ask(ASKED)


def test_models_that_want_the_newer_name_of_the_limit_get_it():
    def answer(number, body):
        if "max_tokens" in body:
            return 400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}}, {}
        return "A"

    with serving(answer) as model:
        asked = endpoint(model, max_tokens=9)
        assert [asked.ask(ASKED).text for _ in range(2)] == ["A", "A"]
    assert [body.get("max_completion_tokens") for body in model.bodies] == [None, 9, 9]


def test_no_server_is_told_at_once(patient):
    with serving(then("A")) as model:
        pass
    with pytest.raises(EvaluationError, match="cannot be reached") as told:
        endpoint(model, patient).ask(ASKED)
    assert not isinstance(told.value, Unanswered)
    assert patient == []


@pytest.mark.parametrize(
    "url", ["", "api.example", "ftp://a/v1", "http://", "https://u:p@a/v1", "https://a/v1?key=x", "http://a:x/", "http://[/"]
)
def test_addresses_that_cannot_be_used_are_refused(url):
    with pytest.raises(EvaluationError, match="address"):
        Endpoint(url, "seer")


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key):
    with pytest.raises(EvaluationError, match="key") as told:
        Endpoint("https://a/v1", "seer", key)
    assert key not in str(told.value)
    assert KEY not in repr(Endpoint("https://a/v1", "seer", KEY))


def test_it_is_told_where_all_goes_unencrypted():
    found = {
        url: Endpoint(url, "m").is_open
        for url in ("http://a/v1", "https://a/v1", "http://127.0.0.1:1/v1", "http://localhost/", "http://[::1]/")
    }
    assert list(found.values()) == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("A", 0), (" d\n", 3), ('{"choice": "B"}', 1), ('{"choice": "c", "why": "A is dull"}', 2), ('```json\n{"choice": "B"}\n```', 1),
        ("```\nA\n```", 0), ("E", None), ("", None), ("A.", None), ("Picture A", None), ("A or B", None), ('{"choice": "E"}', None),
        ('{"choice": 1}', None), ('{"choice": ["A"]}', None), ('{"choose": "A"}', None), ('"A"', None), ("AB", None),
        ('{"choice": "A"} because', None), ("1", None), ('{"choice": ""}', None), ("[" * 9999, None), ("null", None),
    ],
)  # fmt: skip
def test_only_a_letter_or_json_is_a_vote(text, place):
    assert protocol.choice_of(text, 4) == place


def test_a_letter_that_was_not_shown_is_no_vote():
    assert protocol.choice_of("C", 3) == 2
    assert protocol.choice_of("C", 2) is None


@pytest.mark.parametrize(
    ("size", "limit", "tokens"),
    [
        ((512, 512), 512, 255),
        ((1024, 1024), 1024, 765),
        ((2048, 4096), 4096, 1105),
        ((1024, 1024), 512, 255),
        ((64, 64), 512, 255),
        ((600, 300), 600, 425),
    ],
)
def test_pictures_cost_what_openai_documents(tmp_path, size, limit, tokens):
    """765 and 1105 are the examples there; 255 is one tile, 425 are two."""
    folder = plain_folder(tmp_path, pairs=1, seeds=1, methods=("direct", "klora"))
    for path in folder.rglob("*.png"):
        Image.new("1", size).save(path)
    (task,) = protocol.tasks(open_trials(folder)[0], ("direct", "klora"), 1, 1)
    words = "The subject:The style:Picture A:Picture B:" + protocol.instruction(2, "Which?")
    assert protocol.tokens(task, "Which?", limit) == 4 * tokens + -(-len(words) // 4)


def test_each_run_has_an_order_of_its_own_and_every_place_is_as_likely(tmp_path):
    folder = plain_folder(tmp_path, pairs=20, seeds=4, size=(1, 1))
    made = protocol.tasks(open_trials(folder)[0], METHODS, 80, 5)
    assert len(made) == 400
    counts = Counter((place, method) for task in made for place, method in enumerate(task.shown))
    assert all(abs(count - 100) < 45 for count in counts.values())
    assert len({task.shown for task in made if task.trial == made[0].trial}) > 1
    again = protocol.tasks(open_trials(folder)[0], METHODS[::-1], 30, 2)
    assert {(key(task), task.shown) for task in again} <= {(key(task), task.shown) for task in made}


def key(task):
    return task.trial.pair.name, task.trial.seed, task.run


def run(capsys, folder, model, *options):
    """The command with its environment; (exit code, standard output, standard error without the bar)."""
    os.environ |= {"DYNFUSE_JUDGE_URL": model.url, "DYNFUSE_JUDGE_MODEL": "seer", "DYNFUSE_JUDGE_KEY": KEY}
    try:
        code = cli.main(["judge", str(folder), *map(str, options)])
    except SystemExit as stopped:
        code = stopped.code
    finally:
        for name in ("DYNFUSE_JUDGE_URL", "DYNFUSE_JUDGE_MODEL", "DYNFUSE_JUDGE_KEY"):
            del os.environ[name]
    out, told = capsys.readouterr()
    return code, out, told


def test_the_judge_chooses_the_method_whose_picture_it_likes(folder, capsys):
    with serving(prefers("klora")) as model:
        code, out, _ = run(capsys, folder, model, "--yes", "--size", "16", "--price", "2.5", "10")
    assert code == 0
    assert "4 questions of 4 pictures, runs of each: 3, 12 requests." in out
    assert "12 answers, 12 votes." in out
    assert "12,000 tokens sent and 84 received: 0.03." in out
    for body in model.bodies:
        shown = images(body)
        assert list(shown) == ["The subject", "The style", "Picture A", "Picture B", "Picture C", "Picture D"]
        assert max(max(picture.size) for picture in shown.values()) <= 16
    (result,) = judge_results(folder)
    assert (result["judge"], result["asked"], result["answers"], result["without"], result["undecided"]) == ("seer", 4, 12, 0, 0)
    assert {one["method"]: one["share"]["mean"] for one in result["methods"]} == {method: float(method == "klora") for method in METHODS}
    assert sum(result["positions"]["counts"]["4"]) == 12
    json.dumps(result, allow_nan=False)


def test_two_of_three_runs_win_a_question_and_less_leave_it_undecided(folder, capsys):
    def answer(number, body):
        if number in (3, 5):
            return "A picture is worth a thousand words."
        return prefers("klora" if number in (0, 1) else "direct" if number in (2, 4) else METHODS[number % 3])(number, body)

    with serving(answer) as model:
        _, out, _ = run(capsys, folder, model, "--yes")
    (result,) = judge_results(folder)
    # Two for klora, one for direct; one for direct, two no votes; and three different ones, twice.
    assert (result["asked"], result["undecided"], result["without"]) == (4, 3, 2)
    assert {one["method"]: one["chosen"] for one in result["methods"]} == {"klora": 1, "direct": 0, "balanced": 0, "paper's <b>": 0}
    assert "2 nonsense" in out
    assert "3 questions of 4 undecided" in out


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        (completion(None, refusal="No."), "refusal"),
        (completion("A", finish="content_filter"), "refusal"),
        ((400, {"error": {"message": "Filtered", "code": "content_filter"}}, {}), "refusal"),
        (completion('{"choi', finish="length"), "cut off"),
        (completion("", finish="length"), "cut off"),
        ("Both are lovely", "nonsense"),
        (completion(None), "nonsense"),
    ],
)
def test_refusals_and_nonsense_are_counted_kept_and_no_votes(folder, capsys, answer, kind):
    with serving(then(answer)) as model:
        code, out, _ = run(capsys, folder, model, "--yes", "--questions", "1", "--runs", "2")
    assert code == 0
    assert f"2 answers, 0 votes, no votes: 2 {kind}." in out
    assert len(model.bodies) == 2
    (ballot,) = read_ballots(folder)
    assert [vote.chosen for vote in ballot.votes] == [None, None]
    (result,) = judge_results(folder)
    assert (result["without"], result["undecided"], result["methods"]) == (2, 1, [])


def test_a_judge_that_takes_the_first_picture_is_told_of(tmp_path, capsys):
    folder = plain_folder(tmp_path, pairs=1, seeds=5)
    with serving(then("A")) as model:
        _, out, _ = run(capsys, folder, model, "--yes")
    assert judge_results(folder)[0]["positions"] == {"counts": {"4": [15, 0, 0, 0]}, "chance": pytest.approx(4 * 0.25**15)}
    assert "This judge follows the position" in out


def test_an_interrupted_judge_goes_on_where_it_stopped(folder, capsys):
    stop = (401, {"error": {"message": f"key {KEY} has expired"}}, {})
    with serving(lambda number, body: stop if number == 5 else prefers("klora")(number, body)) as model:
        code, _, told = run(capsys, folder, model, "--yes")
        assert code == 2
        assert KEY not in told
        before = (folder / "votes").glob("judge-*.json").__next__().read_bytes()
        assert len(json.loads(before)["votes"]) == 5
        (result,) = judge_results(folder)
        assert (result["asked"], result["undecided"]) == (2, 0)  # two of its three runs are enough
        code, out, _ = run(capsys, folder, model, "--yes")
        assert code == 0
        assert "12 requests, of which 5 are answered already." in out
        assert len(model.bodies) == 6 + 7
        again = run(capsys, folder, model)  # nothing is left to ask, and so nothing to agree to
        assert again[0] == 0
        assert len(model.bodies) == 6 + 7
    assert len(read_ballots(folder)[0].votes) == 12


def test_one_question_without_an_answer_holds_up_no_other_and_is_asked_again(folder, capsys):
    broken = (500, {"error": {"message": "boom"}}, {})
    with serving(lambda number, body: broken if number == 1 else "A") as model:
        code, _, told = run(capsys, folder, model, "--yes", "--retries", "0")
        assert code == 0
        assert "1 of 12 requests got no answer" in told
        assert len(read_ballots(folder)[0].votes) == 11
        run(capsys, folder, model, "--yes", "--retries", "0")
    assert len(read_ballots(folder)[0].votes) == 12


def test_an_endpoint_that_went_away_is_told_and_the_answers_stay(folder, capsys):
    with serving(lambda number, body: "A" if number < 2 else (503, {"error": {"message": "gone"}}, {})) as model:
        code, _, told = run(capsys, folder, model, "--yes", "--retries", "0")
    assert code == 2
    assert len(model.bodies) == 2 + 3
    assert "gone" in told
    assert "2 answers came before and are kept" in told
    assert len(read_ballots(folder)[0].votes) == 2


def test_the_key_is_neither_printed_nor_written(folder, capsys):
    with serving(then(completion(f'your key is {KEY}, {{"choice": "A"}}'))) as model:
        _, out, told = run(capsys, folder, model, "--yes")
    assert KEY not in out + told
    for path in folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    assert "[key]" in next((folder / "votes").glob("judge-*.json")).read_text()


@pytest.mark.parametrize(("typed", "asked"), [("y\n", 12), ("n\n", 0), ("\n", 0), ("", 0)])
def test_nothing_is_sent_before_the_user_agrees(folder, capsys, monkeypatch, typed, asked):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with serving(then("A")) as model:
        code, out, _ = run(capsys, folder, model)
    assert len(model.bodies) == asked
    assert code == (0 if asked else 2)
    assert "12 requests" in out
    assert "no --price" in out
    assert "sent to that address" in out


def test_another_question_is_another_judge(folder, capsys):
    with serving(then("A")) as model:
        run(capsys, folder, model, "--yes", "--runs", "1")
        run(capsys, folder, model, "--yes", "--runs", "1", "--question", "Which is prettier?")
    assert len(model.bodies) == 8
    assert sorted(question for result in judge_results(folder) for question in result["questions"]) == sorted(
        [protocol.QUESTION, "Which is prettier?"]
    )
    assert "Which is prettier?" in model.bodies[-1]["messages"][0]["content"][-1]["text"]


def test_judges_and_people_do_not_mix(folder, capsys):
    Sheet("ab" * 16, "Which?").save(folder)
    with serving(then("A")) as model:
        run(capsys, folder, model, "--yes", "--json", folder / "result.json")
    assert len(judge_results(folder)) == 1
    assert json.loads((folder / "result.json").read_text()) == judge_results(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "direct"], "2 to 4 methods, not 1"),
        (["--methods", "direct", "nobody"], "nobody"),
        (["--model", ""], "--model"),
        (["--url", ""], "address"),
        (["--key-file", "nowhere.key"], "nowhere.key"),
        (["--timeout", "0"], "--timeout"),
        (["--price", "-1", "2"], "--price"),
        (["--price", "1"], "--price"),
        (["--runs", "0"], "--runs"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(folder, capsys, options, words):
    with serving(then("A")) as model:
        code, out, told = run(capsys, folder, model, "--yes", *options)
    assert (code, out, told.count("\n"), model.bodies) == (2, "", 1, [])
    assert words in told


def test_without_an_answer_the_result_says_so(folder, capsys):
    assert cli.main(["judge", str(folder), "--result"]) == 0
    assert capsys.readouterr().out == "No judge has answered yet.\n"


def test_a_key_may_be_in_a_file(folder, capsys, tmp_path):
    (tmp_path / "key").write_text("other-key-123\n")
    with serving(then("A"), key="other-key-123") as model:
        assert run(capsys, folder, model, "--yes", "--key-file", tmp_path / "key")[0] == 0
