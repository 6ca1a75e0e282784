"FaceGPT's judges: LLaVA's protocol and its files, judges that fail, the schema judge against a slow twin."

import hashlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from facelab.facegpt import chat_tables, judge_models
from facelab.facegpt import judge as judge_module
from facelab.facegpt.judge import (
    RULE, is_published, RecordedJudge, Reply, Review, bench_gain, bench_rows, bench_scores, judge_prompt, order_lead, parse_review, read_answers, read_contexts, read_jsonl,
    read_questions, read_reviews, read_rules, review_bench, write_answers, write_reviews, JudgePrompt,
)  # fmt: skip
from facelab.facegpt.judge_models import EndpointJudge, LocalJudge, ReplyCache, reply_text, JudgeFailure
from facelab.lab.errors import InputError, Skipped
from facelab.lab.ratio import pooled_ratio
from facelab.lab.record import bootstrap

SECRET = "sk-test-0123456789"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


# the files of LLaVA-Bench


def bench_files(tmp_path, order=(0, 1, 2)):
    rows = [
        {"question_id": 0, "image": "000000441147.jpg", "text": "What colour are the cases?", "category": "conv"},
        {"question_id": 1, "image": "000000441147.jpg", "text": "Describe the picture.", "category": "detail"},
        {"question_id": 2, "image": "000000353536.jpg", "text": "What may have happened here?", "category": "complex"},
    ]
    contexts = [
        {"id": "441147", "image": "000000441147.jpg", "captions": ["Two cases.", "Old cases."], "instances": [{"category": "suitcase", "bbox": [0.1, 0.25, 0.504, 1.0]}]},
        {"id": "353536", "image": "000000353536.jpg", "captions": ["A table."], "instances": []},
    ]
    answers = [{"question_id": k, "text": f"answer {k}", "answer_id": "x", "model_id": "m", "metadata": {}} for k in order]
    return (
        read_questions(write_lines(tmp_path / "q.jsonl", rows)),
        read_answers(write_lines(tmp_path / "ref.jsonl", [{"question_id": k, "text": f"reference {k}", "category": "conv"} for k in range(3)])),
        read_answers(write_lines(tmp_path / "a.jsonl", answers)),
        read_contexts(write_lines(tmp_path / "c.jsonl", contexts)),
    )


class Listening:
    "Keeps the prompts; says 8 6."

    name = "listening"

    def __init__(self):
        self.seen = []

    def ask(self, prompts):
        self.seen += prompts
        return [Reply("8 6") for _ in prompts]


def test_published_prompt_to_the_letter(tmp_path):
    assert not is_published(RULE) and len(RULE) > 200  # ours: LLaVA's own wording comes with its files
    judge = Listening()
    review_bench(judge, *bench_files(tmp_path))
    want = (
        "[Context]\nTwo cases.\nOld cases.\n\nsuitcase: [0.1, 0.25, 0.504, 1.0]\n\n[Question]\nWhat colour are the cases?\n\n[Assistant 1]\nreference 0\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\nanswer 0\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
    )
    assert judge.seen[0].user == want
    assert judge.seen[0].system == "You are a helpful and precise assistant for checking the quality of the answer."


def test_answers_are_joined_by_id_not_by_line(tmp_path):
    straight, mixed = Listening(), Listening()
    review_bench(straight, *bench_files(tmp_path))
    review_bench(mixed, *bench_files(tmp_path, order=("2", 0, "1")))
    assert straight.seen == mixed.seen


def test_what_is_missing_is_counted_not_fatal(tmp_path):
    questions, references, answers, contexts = bench_files(tmp_path)
    del answers[1], contexts["000000353536.jpg"]
    reviews = review_bench(Listening(), questions, references, answers, contexts)
    assert [r.error for r in reviews] == ["", "no answer", "no context"]
    assert bench_scores(reviews)["all"][3:] == (1, 2)
    assert review_bench(Listening(), questions, references, answers, contexts, rules={})[0].error == "no rule"


@pytest.mark.parametrize("line", ["[1]", "{", '{"question_id": 1}', '{"question_id": true, "text": "a"}', '{"question_id": 1, "text": null}', '{"question_id": 1.5, "text": "a"}', "[" * 100_000])
def test_bad_lines(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"question_id": 0, "text": "two\u2028lines"}\r\n\r\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match="line 3"):
        read_answers(path)
    skipped = Skipped()
    assert read_answers(path, skipped) == {0: "two\u2028lines"} and len(skipped) == 1


def test_twice_the_same_id(tmp_path):
    with pytest.raises(InputError, match="one answer a question"):
        read_answers(write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "a"}, {"question_id": "1", "text": "b"}]))
    row = {"question_id": 1, "image": "a", "text": "b", "category": "conv"}
    with pytest.raises(InputError, match="an id a question"):
        read_questions(write_lines(tmp_path / "q.jsonl", [row, row]))


def test_other_layouts(tmp_path):
    wild = write_lines(tmp_path / "context.jsonl", [{"id": 0, "image": "1.jpg", "caption": "A fruit."}])
    assert read_contexts(wild) == {"1.jpg": "A fruit."}
    bad = write_lines(tmp_path / "bad.jsonl", [{"image": "1.jpg", "captions": [3]}, {"image": "2.jpg", "captions": ["a"], "instances": [{"bbox": []}]}, {"image": "3.jpg"}])
    skipped = Skipped()
    assert read_contexts(bad, skipped) == {} and len(skipped) == 3
    rules = tmp_path / "rule.json"
    rules.write_text(json.dumps({"conv": {"role": "Assistant", "prompt": "P"}}))
    assert read_rules(rules) == {"conv": "P"}
    rules.write_text('["conv"]')
    with pytest.raises(InputError):
        read_rules(rules)
    write_answers(tmp_path / "w.jsonl", {3: "ä\nb"}, "m")
    assert read_answers(tmp_path / "w.jsonl") == {3: "ä\nb"} and read_jsonl(tmp_path / "w.jsonl", {"answer_id": str, "model_id": str})[0]["model_id"] == "m"


# reading reviews, and the ratio


@pytest.mark.parametrize(
    "text, ours, published",
    [
        ("8 9", (8, 9), (8, 9)), ("8.5 9\nwhy", (8.5, 9), (8.5, 9)), ("8, 9\n", (8, 9), (-1, -1)), ("8,9", (8, 9), (8, 9)), ("8 9\r\nwhy", (8, 9), (8, 9)), ("\n8 9", (8, 9), (-1, -1)),
        ("8  9", (8, 9), (-1, -1)), ("0 10", (0, 10), (0, 10)), ("11 9", None, (11, 9)), ("-1 -1", None, (-1, -1)), ("8", None, (-1, -1)), ("8 9 10", None, (-1, -1)),
        ("8/10 9/10", None, (-1, -1)), ("Scores: 8 9", None, (-1, -1)), ("", None, (-1, -1)), ("8 nine", None, (-1, -1)), ("8 9 because", None, (-1, -1)), ("1e1 9", None, (10, 9)),
        ("I'm sorry, I can't help.", None, (-1, -1)),
    ],
)  # fmt: skip
def test_parse(text, ours, published):
    assert parse_review(text) == ours and parse_review(text, published=True) == published


RECORDED = [  # LLaVA's layout; marks by hand
    {"id": 1, "question_id": 0, "category": "conv", "content": "9 8\nGood.", "tuple": [9.0, 8.0]},
    {"id": 2, "question_id": 1, "category": "detail", "content": "8 6\nShort.", "tuple": [8.0, 6.0]},
    {"id": 3, "question_id": 2, "category": "complex", "content": "8 10\nBetter.", "tuple": [8.0, 10.0]},
    {"id": 4, "question_id": 3, "category": "llava_bench_conv", "content": "7 4", "tuple": [7.0, 4.0]},
    {"id": 5, "question_id": 4, "category": "detail", "content": "Sorry, no.", "tuple": [-1, -1]},
    {"id": 6, "question_id": 5, "category": "complex", "content": None, "tuple": [-1, -1], "error": "HTTP 500"},
    {"id": 7, "question_id": 6, "category": "complex", "tuple": [10.0, 8.5]},
]


def test_score_of_recorded_reviews_by_hand(tmp_path):
    reviews = read_reviews(write_lines(tmp_path / "r.jsonl", RECORDED), images={0: "a", 1: "a", 2: "a", 3: "b"})
    found = bench_scores(reviews)
    assert {k: round(s.value, 4) for k, s in found.items()} == {"conv": 75.0, "detail": 75.0, "complex": round(1850 / 18, 4), "all": round(3650 / 42, 4)}
    assert {k: (s.n, s.left_out) for k, s in found.items()} == {"conv": (2, 0), "detail": (1, 1), "complex": (2, 1), "all": (5, 2)}
    as_published = bench_scores(reviews, published=True)
    assert (as_published["conv"].value, as_published["detail"].value) == (75.0, round(100 * 5 / 7, 1)) and as_published["all"].value == round(100 * 35.5 / 41, 1)
    assert list(found) == ["conv", "detail", "complex", "all"] and all(s.low <= s.value <= s.high for s in found.values())
    write_reviews(tmp_path / "again.jsonl", reviews)
    assert read_reviews(tmp_path / "again.jsonl") == reviews
    rows = bench_rows("FaceGPT", reviews, "recorded", table="Table 3")
    assert [r.metric for r in rows] == ["Conv", "Detail", "Complex", "All"] and rows[1].data == "judge recorded, by a rule that is not known, 1 left out" and rows[3].table == "Table 3"


@pytest.fixture()
def publish(monkeypatch):
    "Takes a text for LLaVA's own rule, whose words are not ours to keep."
    return lambda text: monkeypatch.setattr(judge_module, "PUBLISHED_RULE", hashlib.sha256(text.encode()).hexdigest()[:16])


def test_rows_say_by_which_rule(tmp_path, publish):
    publish("The published rule.")
    files, published = bench_files(tmp_path), dict.fromkeys(("conv", "detail", "complex"), "The published rule.")
    said = lambda reviews: {row.data for row in bench_rows("m", reviews, "j", draws=20)}
    good, ours = review_bench(Listening(), *files, published), review_bench(Listening(), *files)
    assert said(good) == {"judge j"} and said(ours) == {"judge j, not by the published rule"}
    one = review_bench(Listening(), *files, published | {"detail": RULE})
    assert {row.metric: row.data for row in bench_rows("m", one, "j", draws=20)} == {"Conv": "judge j", "Complex": "judge j", "Detail": "judge j, not by the published rule", "All": "judge j, not by the published rule"}
    assert bench_gain("m", good, ours, "j", draws=20).data == "judge j, not by the published rule" and bench_gain("m", good, good, "j", draws=20).data == "judge j"
    both = review_bench(Listening(), *files, swap=True)
    assert order_lead("m", both, "j", draws=20).data == "judge j, not by the published rule"
    write_reviews(tmp_path / "kept.jsonl", ours)
    again = review_bench(RecordedJudge(tmp_path / "kept.jsonl"), *files, published)  # the file knows better than the call
    assert said(again) == {"judge j, not by the published rule"} and [r.rule for r in again] == ["other"] * 3
    assert said(review_bench(RecordedJudge(write_lines(tmp_path / "r.jsonl", RECORDED)), *files, published)) == {"judge j, by a rule that is not known"}


@pytest.mark.parametrize(("rule", "row", "note"), [(None, "judge 8, not by the published rule", "there is no rule.json"), ("Judge well.", "judge 8, not by the published rule", "is another one"), ("The published rule.", "judge 8", None)])
def test_a_missing_rule_is_not_silent(tmp_path, publish, monkeypatch, rule, row, note):
    "The stage's own way: files of the benchmark in a folder, with LLaVA's rule, with another, without."
    publish("The published rule.")
    bench_files(tmp_path)
    for old, new in (("q", "qa90_questions"), ("ref", "qa90_gpt4_answer"), ("c", "caps_boxes_coco2014_val_80")):
        (tmp_path / f"{old}.jsonl").rename(tmp_path / f"{new}.jsonl")
    if rule:
        (tmp_path / "rule.json").write_text(json.dumps({name: {"role": "Assistant", "prompt": rule} for name in ("conv", "detail", "complex")}))
    monkeypatch.setattr(chat_tables, "read_image", lambda path: np.zeros((8, 8, 3), np.uint8))
    talker = SimpleNamespace(vision=lambda pixels: pixels, pixels=lambda images: images, generate=lambda talks, picture, most: [SimpleNamespace(text="An answer.")])
    judge = Listening()
    judge.name = "8"
    reviews, notes = chat_tables.judged_bench("FaceGPT", talker, tmp_path, judge)
    assert {r.data for r in bench_rows("FaceGPT", reviews, judge.name, draws=20)} == {row} and len(judge.seen) == 3
    assert [note in said for said in notes] == [True] if note else notes == []


def test_a_published_average_of_failures_is_a_perfect_score():
    silent = [Review(k, "conv", str(k), "no") for k in range(3)]
    assert bench_scores(silent, published=True)["all"].value == 100.0
    assert bench_scores(silent)["all"] == (None, None, None, 0, 3) and bench_scores([])["all"].value is None


def test_swapped_reviews_are_put_right():
    both = [Review(0, "conv", "a", "8 6"), Review(0, "conv", "a", "7 9", swapped=True)]
    assert bench_scores(both)["all"].value == 100 * (6 + 7) / (8 + 9)
    with pytest.raises(InputError, match="published order"):
        bench_scores(both, published=True)


def test_bootstrap_is_the_lab_s_and_over_pictures():
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.normal(0, 2, 40), 5)
    bottom, top, groups = np.full(200, 8.0), 6 + shared, [f"p{k}" for k in np.repeat(np.arange(40), 5)]
    value, low, high = pooled_ratio(top, bottom, groups, draws=350, seed=3)
    slow = bootstrap(np.arange(200), groups, lambda i: top[i.astype(int)].sum() / bottom[i.astype(int)].sum(), draws=350, seed=3)
    assert np.allclose((value, low, high), slow)
    alone = pooled_ratio(top, bottom, draws=350)
    assert high - low > 1.7 * (alone[2] - alone[1]), "questions of one picture are not independent"


def test_gain_is_paired():
    rng = np.random.default_rng(1)
    hard = rng.integers(0, 5, 60)
    old = [Review(k, "conv", str(k), f"8 {3 + hard[k]}") for k in range(60)]
    new = [Review(k, "conv", str(k), f"8 {4 + hard[k]}") for k in range(59)] + [Review(59, "conv", "59", "no")]
    row = bench_gain("new", new, old, "hand", draws=200)
    assert row.n == 59 and row.value == pytest.approx(12.5) and row.high - row.low < 1e-9


# an endpoint that fails in every way


class Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, log = body["messages"][1]["content"], self.server.log
        log.append((text, self.headers.get("Authorization"), self.path, body))
        count = sum(t == text for t, *_ in log)
        good = json.dumps({"choices": [{"message": {"role": "assistant", "content": "8 6\nFine."}}]}).encode()
        code, raw, more = {
            "busy": (429, b"{}", {"Retry-After": "0.2"}) if count == 1 else (200, good, {}),
            "down": (503, b"", {}),
            "half": (200, good[: len(good) // 2], {}),
            "html": (200, b"<html>", {}),
            "odd": (200, b'{"choices": []}', {}),
            "list": (200, b"[]", {}),
            "null": (200, b'{"choices": [{"message": {"content": null}}]}', {}),
            "refusal": (200, b'{"choices": [{"message": {"content": null, "refusal": "I cannot rate people."}}]}', {}),
            "parts": (200, b'{"choices": [{"message": {"content": [{"type": "text", "text": "7 "}, {"type": "text", "text": "5"}]}}]}', {}),
            "long": (400, b'{"error": "too long: sk-test-0123456789"}', {}),
            "key": (401, f"Incorrect API key: {SECRET}".encode(), {}),
            "moved": (302, b"", {"Location": self.server.elsewhere}),
            "endless": (200, b" " * 5_000_000, {}),
        }.get(text, (200, good, {}))
        if text == "slow" and count < 3:
            time.sleep(1.2)
        try:
            self.send_response(code)
            for name, value in more.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw) + 40 * (text == "cut" and count == 1) + 10**6 * (text == "drip")))
            self.end_headers()
            self.wfile.write(raw)
            for _ in range(20 * (text == "drip")):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, *parts):
        pass


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    servers = []
    for _ in range(2):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        server.log, server.elsewhere, server.daemon_threads = [], "", True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    one, two = servers
    one.elsewhere = f"http://127.0.0.1:{two.server_port}/v1/chat/completions"
    monkeypatch.setenv("JUDGE_TEST_KEY", SECRET + "\n")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy must not stand between us and this machine
    make = lambda **more: EndpointJudge(f"http://127.0.0.1:{one.server_port}/v1/", "judge-1", **{"key_name": "JUDGE_TEST_KEY", "cache": tmp_path / "cache.jsonl", "tries": 2, "wait": 0.0, "timeout": 0.5} | more)
    yield make, one, two, tmp_path / "cache.jsonl"
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(judge, *texts):
    return judge.ask([JudgePrompt(k, "S", t) for k, t in enumerate(texts)])


def test_one_failure_leaves_the_others(endpoint, capfd):
    make, server, other, cache = endpoint
    texts = ("ok", "busy", "down", "half", "html", "odd", "list", "null", "refusal", "parts", "long", "moved", "endless", "drip", "cut", "slow", "fine")
    judge = make()
    began = time.monotonic()
    replies = dict(zip(texts, ask(judge, *texts)))
    assert time.monotonic() - began < 20
    assert {t for t, r in replies.items() if r.text} == {"ok", "busy", "refusal", "parts", "cut", "fine"}
    assert replies["busy"].text == replies["ok"].text == "8 6\nFine." and replies["parts"].text == "7 5"
    assert parse_review(replies["refusal"].text) is None
    assert replies["down"].error == "HTTP 503" and replies["long"].error == "HTTP 400" and replies["moved"].error == "HTTP 302"
    assert replies["html"].error == replies["half"].error == "a reply that is not JSON"
    assert replies["slow"].error == replies["drip"].error == "no reply within 0.5 s" and replies["endless"].error == "a reply that does not end"
    times = {t: sum(s == t for s, *_ in server.log) for t in texts}
    assert times["down"] == times["half"] == times["busy"] == times["cut"] == 2 and times["ok"] == times["odd"] == times["long"] == times["refusal"] == times["moved"] == 1
    assert not other.log, "the key followed a redirect"
    assert {a for _, a, *_ in server.log} == {f"Bearer {SECRET}"} and {p for *_, p, _ in server.log} == {"/v1/chat/completions"}
    body = server.log[0][3]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.2, 1024) and [m["role"] for m in body["messages"]] == ["system", "user"]
    out = capfd.readouterr()
    assert SECRET not in cache.read_text() + repr(judge) + repr(replies) + out.out + out.err


def test_waits_as_long_as_the_server_asks_and_doubles(endpoint, monkeypatch):
    make, *_ = endpoint
    slept = []
    monkeypatch.setattr(judge_models.time, "sleep", lambda s: slept.append(s) if threading.current_thread() is threading.main_thread() else None)
    ask(make(wait=0.05), "busy")
    ask(make(wait=30.0, tries=4), "down")
    assert slept == [0.2, 30.0, 60.0, 60.0]


def test_a_wrong_key_is_tried_once(endpoint):
    make, server, *_ = endpoint
    ask(make(), "ok")
    replies = ask(make(), "ok", "key", "fine", "ok")
    assert [bool(r.text) for r in replies] == [True, False, False, True] and "HTTP 401" in replies[2].error and SECRET not in repr(replies)
    assert sum(t == "key" for t, *_ in server.log) == 1 and not any(t == "fine" for t, *_ in server.log)


def test_resumes_from_the_cache(endpoint):
    make, server, _, cache = endpoint
    ask(make(), "one", "two", "down")
    lines = cache.read_text().splitlines()
    assert len(lines) == 2, "a failure is not cached"
    cache.write_text(lines[0] + "\n" + lines[1][:30])  # killed while it wrote
    server.log.clear()
    replies = ask(make(), "one", "two", "three")
    assert [t for t, *_ in server.log] == ["two", "three"] and all(r.text for r in replies)
    server.log.clear()
    ask(make(), "one", "two", "three")
    assert server.log == []
    ask(make(options={"temperature": 0.0}), "one")
    assert [t for t, *_ in server.log] == ["one"], "another setting is another question"
    assert len(ReplyCache(cache).known) == 4


def test_endpoint_refuses_before_it_spends(monkeypatch, tmp_path):
    for url in ("ftp://a", "a.com/v1", "", "https://user:pass@a.com", "https://a.com/v1?key=1", "https://a.com:99999999", "http://[::1"):
        with pytest.raises(InputError):
            EndpointJudge(url, "m")
    with pytest.raises(InputError, match="https"):
        EndpointJudge("http://far.example/v1", "m", key_name="K")
    EndpointJudge("http://far.example/v1", "m")
    monkeypatch.delenv("K", raising=False)
    with pytest.raises(InputError, match="K"):
        ask(EndpointJudge("https://far.example/v1", "m", key_name="K"), "a")
    for value in ("a\nX-Evil: 1", "schlüssel", " "):
        monkeypatch.setenv("K", value)
        with pytest.raises(InputError) as caught:
            ask(EndpointJudge("https://far.example/v1", "m", key_name="K"), "a")
        assert "Evil" not in str(caught.value) and "schl" not in str(caught.value)
    down = ask(EndpointJudge("http://127.0.0.1:1/v1", "m", tries=2, wait=0.0), "a")
    assert down[0].text is None and "connection" in down[0].error
    with pytest.raises(JudgeFailure):
        reply_text(b"[" * 100_000)


# recorded and local judges


def test_recorded_judge(tmp_path):
    judge = RecordedJudge(write_lines(tmp_path / "r.jsonl", RECORDED))
    questions, references, answers, contexts = bench_files(tmp_path)
    reviews = review_bench(judge, questions, references, answers, contexts, swap=True)
    assert [r.content and r.content[:3] for r in reviews[:3]] == ["9 8", "8 6", "8 1"] and {r.error for r in reviews[3:]} == {"no recorded review"}
    assert bench_scores(reviews)["all"].value == pytest.approx(100 * 24 / 25)


def test_a_judge_that_miscounts_is_refused(tmp_path):
    judge = Listening()
    judge.ask = lambda prompts: []
    with pytest.raises(InputError, match="one a prompt"):
        review_bench(judge, *bench_files(tmp_path))


def test_local_judge_refuses_other_folders(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"config\.json"):
        LocalJudge(tmp_path / "nowhere").ask([JudgePrompt(0, "s", "u")])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="safetensors"):
        LocalJudge(tmp_path).ask([JudgePrompt(0, "s", "u")])


def test_judge_prompt_swap_changes_places_only():
    system, user = judge_prompt("Q", "C", "REF", "CAN")
    assert judge_prompt("Q", "C", "REF", "CAN", swapped=True) == (system, user.replace("REF", "#").replace("CAN", "REF").replace("#", "CAN"))


# the schema judge


def random_facts(rng, neutral_share=0.5, known=0.9):
    from facelab.facegpt.schema import SCHEMA

    facts = {}
    for a in SCHEMA.values():
        if rng.random() < known:
            facts[a.name] = a.neutral if a.neutral and rng.random() < neutral_share else a.values[rng.integers(len(a.values))]
    return facts


def slow_tally(said, truth, about, only, neutral):
    "The table of the page, row by row."
    hit = extra = miss = false = judged = unknown = 0
    for name in neutral:
        if only is not None and name not in only:
            continue
        s, t = said.get(name), truth.get(name)
        asked = name in about
        s_counts, t_counts = s is not None and (asked or s != neutral[name]), t is not None and (asked or t != neutral[name])
        if s is not None and t is None:
            unknown += 1
            continue
        if s is not None:
            judged += 1
            false += s != t
        if s_counts and s == t:
            hit += 1
        elif s_counts:
            extra += 1
        if t_counts and s != t and (asked or not about):
            miss += 1
    return hit, extra, miss, false, judged, unknown


def test_tally_against_its_slow_twin():
    from facelab.facegpt.schema_judge import NEUTRAL, tally

    rng = np.random.default_rng(5)
    names = list(NEUTRAL)
    for k in range(400):
        said, truth = random_facts(rng, known=0.5), random_facts(rng)
        about = frozenset(rng.choice(names, rng.integers(0, 3), replace=False).tolist()) if k % 2 else frozenset()
        only = None if k % 3 else set(rng.choice(names, 6, replace=False).tolist())
        assert tuple(tally(said, truth, about, only)) == slow_tally(said, truth, about, only, NEUTRAL)


def test_perfect_and_silent_answers():
    from facelab.facegpt.schema_judge import BenchAnswer, fact_rows, judge_answers

    rng = np.random.default_rng(2)
    truths = [random_facts(rng) for _ in range(12)]
    read = json.loads
    perfect = judge_answers([BenchAnswer(json.dumps(t), t, str(k)) for k, t in enumerate(truths)], read=read)
    silent = judge_answers([BenchAnswer("{}", t, str(k)) for k, t in enumerate(truths)], read=read)
    assert {r.metric: r.value for r in fact_rows("p", perfect)} == {"fact precision": 1, "fact recall": 1, "fact F1": 1, "hallucination rate": 0, "answers with a false mention": 0}
    assert {r.metric: r.value for r in fact_rows("s", silent)} == {"fact recall": 0, "fact F1": 0, "answers with a false mention": 0}


def test_describe_and_read_make_a_perfect_speaker():
    from facelab.facegpt.describe import describe
    from facelab.facegpt.schema_judge import VISIBLE, BenchAnswer, fact_rows, judge_answers, shuffled_rows

    rng = np.random.default_rng(3)
    truths = [random_facts(rng) for _ in range(60)]
    answers = [BenchAnswer(describe(t, rng), t, str(k)) for k, t in enumerate(truths)]
    rows = {r.metric: r for r in fact_rows("p", judge_answers(answers), draws=100)}
    assert rows["fact F1"].value == 1 and rows["hallucination rate"].value == 0
    rows = {r.metric: r for r in shuffled_rows("p", answers, only=VISIBLE, draws=100)}
    assert rows["fact F1, same answers"].value == 1 and rows["fact F1, another picture's truth"].high < 0.5 and rows["F1 over another picture's F1"].low > 2


def test_shuffling_gives_every_picture_another():
    from facelab.facegpt.schema_judge import BenchAnswer, derangement, shuffled

    names = [f"p{k}" for k in range(31)]
    for seed in range(20):
        other = derangement(names * 2, seed)
        assert sorted(other.values()) == sorted(names) and all(k != v for k, v in other.items())
    answers = [BenchAnswer("yes", {"hat": "hat"}, "a", "complex", "Q", expected="yes"), BenchAnswer("yes", {"hat": "none"}, "b", "complex", "Q", expected="no"), BenchAnswer("x", {"hat": "hat"}, "a", "complex", "only a", expected="x")]
    pairs = shuffled(answers)
    assert [(p.expected, q.expected) for p, q in pairs] == [("yes", "no"), ("no", "yes")] and pairs[0][1].truth == {"hat": "none"}


def test_table_shape_never_shares_a_metric_with_the_paper():
    import pandas as pd

    from facelab.facegpt.schema_judge import BenchAnswer, judge_answers, schema_table
    from facelab.lab.paths import root

    answers = [BenchAnswer("yes", {"hat": "hat"}, "a", kind, expected="yes") for kind in ("conv", "detail", "complex")]
    rows = schema_table("FaceGPT", judge_answers(answers, read=lambda text: {}))
    assert [r.metric for r in rows] == ["Conv (schema)", "Detail (schema)", "Complex (schema)", "All (schema)"] and {r.value for r in rows} == {100.0}
    assert not {r.metric for r in rows} & set(pd.read_csv(root() / "results" / "reference.csv").metric)


def test_face_iff_asked():
    from facelab.facegpt.schema_judge import face_iff_asked

    rng = np.random.default_rng(0)
    asked = rng.random(400) < 0.4
    emitted = np.where(rng.random(400) < 0.1, ~asked, asked)
    rows, table = face_iff_asked(emitted, asked, [f"p{k // 2}" for k in range(400)])
    assert table.given + table.withheld == asked.sum() and sum(table) == 400 and rows[0].value == pytest.approx(100 * (table.given + table.quiet) / 400)
    assert 85 < rows[0].low < rows[0].value < rows[0].high < 97 and [r.n for r in rows] == [400, asked.sum(), 400 - asked.sum()]
    rows, _ = face_iff_asked(np.ones(10, bool), np.ones(10, bool))
    assert [r.metric for r in rows] == ["<FACE> iff asked", "<FACE> when asked"] and rows[0].low == pytest.approx(69.15, abs=0.01)  # Clopper-Pearson, 10 of 10
    with pytest.raises(InputError):
        face_iff_asked(np.ones(2, bool), np.ones(3, bool))


def test_cycle_and_distinct():
    from facelab.facegpt.schema_judge import BenchAnswer, cycle_rows, distinct_rows

    rng = np.random.default_rng(9)
    faces = [random_facts(rng, 0.2, 1.0) for _ in range(40)]
    rows = cycle_rows("t", faces, faces, only={"yaw", "skin"})
    assert [r.value for r in rows if r.metric == "cycle agreement"] == [100, 100, 100] and rows[1].value < 60 and {r.data for r in rows[2:]} == {"yaw", "skin"}
    one = [BenchAnswer("the same", {}, str(k)) for k in range(20)]
    assert [r.value for r in distinct_rows("t", one)] == [0.05, 0.0]
    many = [BenchAnswer(str(k), {}, str(k)) for k in range(20)]
    assert [(r.value, r.low, r.high) for r in distinct_rows("t", many)] == [(1.0, None, None), (1.0, 1.0, 1.0)]


def test_nothing_of_the_key_stays(monkeypatch):
    monkeypatch.setenv("K", SECRET)
    judge = EndpointJudge("https://far.example/v1", "m", key_name="K")
    assert SECRET not in repr(vars(judge)) and os.environ["K"] == SECRET


def test_bench_of_known_faces():
    from dataclasses import replace

    from facelab.facegpt.describe import describe, read_facts
    from facelab.facegpt.schema_judge import VISIBLE, face_bench, judge_answers, same_answer, schema_table
    from facelab.facegpt.talk import answer

    rng = np.random.default_rng(4)
    truths = {f"p{k}": random_facts(rng, known=1.0) for k in range(30)}
    for held_out in (False, True):
        bench = face_bench(truths, seed=1, held_out=held_out)
        assert [a.kind for a in bench] == ["conv", "detail", "complex"] * 30 and len({a.about for a in bench}) > 5
        verdicts = [a.expected[:2] for a in bench if a.expected]
        assert 6 < verdicts.count("No") < 24
        said = [replace(a, text=a.expected or (answer(*a.about, a.truth, rng) if a.about else describe(a.truth, rng))) for a in bench]
        rows = schema_table("knows", judge_answers(said, VISIBLE), draws=50)
        assert [(r.value, r.n) for r in rows] == [(100, 30), (100, 30), (100, 30), (100, 90)]
        blind = [replace(a, text="Yes, because the mouth is closed.") for a in bench]
        assert all(r.value < 40 for r in schema_table("blind", judge_answers(blind, VISIBLE), draws=50))
    assert same_answer("Yes, the smile is broad.", "Yes, because the smile is broad.", read_facts)
    assert not same_answer("No, because the smile is broad.", "Yes, because the smile is broad.", read_facts)
    assert not same_answer("Yes.", "Yes, because the smile is broad.", read_facts), "a verdict without its reason is a guess"
