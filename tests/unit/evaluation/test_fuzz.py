"""Whatever stands in a file of an evaluation set: it is read, or refused in the project's own words."""

import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hncse_ray.errors import HncseError
from hncse_ray.evaluation import read_collection
from hncse_ray.evaluation.sts import read_sts
from hncse_ray.evaluation.transfer import transfer_files

CORPUS = b'{"_id": "d", "title": "t", "text": "x"}\n{"_id": "e", "text": "y"}\n'
QUERIES = b'{"_id": "q", "text": "x"}\n'
JUDGED = b"query-id\tcorpus-id\tscore\nq\td\t1\n"
SICK = b"pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n1\ta b\tc d\t3.5\tNEUTRAL\n"
COLLECTION = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/dev.tsv": JUDGED}
STS = {
    "STSBenchmark": ("dev", "STS/STSBenchmark/sts-dev.csv"),
    "SICKRelatedness": ("dev", "SICK/SICK_trial.txt"),
}
TRANSFER = ["SST2", "TREC", "MRPC", "CR"]
PIECES = st.sampled_from([
    CORPUS, QUERIES, JUDGED, SICK, b"\t", b"\n", b"\r", b"\0", b"\xff", b"\xc2\x85", b"\xef\xbb\xbf", b'"',
    b"nan", b"1e400", b"-1", b"2.5", b"9" * 5000, b"1_0", "\u0663".encode(), b'"\\ud800"', b"DESC:x y\n", b"a b\t1\n",
    b"q\td\t2\n", b"q\td\n", b'{"_id": 7, "text": "x"}\n', b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
    b"1\t2\t3\ta b\tc d\n", b"a\tb\tc\td\t2.0\te\tf\n",
])  # fmt: skip
DOCUMENTS = st.lists(PIECES | st.binary(max_size=4), max_size=12).map(b"".join)


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def readable(read):
    try:
        read()
    except HncseError as error:
        str(error).encode()


def check(folder, data):
    for name in COLLECTION:
        put(folder, COLLECTION | {name: data})
        readable(lambda: read_collection(folder, ["dev"]))
    for task, (split, name) in STS.items():
        put(folder, {name: data})
        readable(lambda task=task, split=split: read_sts(task, split, folder))
    read_task = sys.modules["hncse_ray.evaluation.transfer"]._read_task
    for task in TRANSFER:
        put(folder, dict.fromkeys(transfer_files()[task], data))
        readable(lambda task=task: read_task(task, folder))


def fuzz(examples):
    quiet = settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    return lambda function: quiet(given(data=DOCUMENTS)(function))


@fuzz(60)
def test_whatever_is_in_a_file(tmp_path, data):
    check(tmp_path, data)


@pytest.mark.slow
@pytest.mark.timeout(600)
@fuzz(5000)
def test_whatever_is_in_a_file_at_length(tmp_path, data):
    check(tmp_path, data)
