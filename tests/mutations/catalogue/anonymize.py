"""What is done to columns before they are sealed, and what is said of it."""

from __future__ import annotations

from mutation import Mutation

KEYED = "tests/anonymize/test_keyed.py"
REPORT = "tests/data/test_anonymization_report.py"

CATALOGUE = [
    Mutation(
        "an altered token is taken",
        "anonymize/keyed.py",
        "value = found if self.of(found, generation=generation) == token else None",
        "value = found",
        f"{KEYED} -k tampered",
    ),
    Mutation(
        "pseudonyms of two domains can be linked",
        "anonymize/keyed.py",
        'purpose = f"pseudonym/{self._domain}"',
        'purpose = "pseudonym"',
        f"{KEYED} -k linked",
    ),
    Mutation(
        "rows of before an interruption are missing in the report and nobody is told",
        "data/writing/seal.py",
        "    writer.recount({name: values[:again] for name, values in columns.items()})\n",
        "    writer._pending.unseen -= again\n",
        f"{REPORT} -k report_of_all_rows",
    ),
    Mutation(
        "rows that were refused hide others in the report",
        "data/writing/row_buffer.py",
        "        return self._anonymizer.run(columns)\n",
        "        applied = self._anonymizer.run(columns)\n"
        "        self._count(self._tally.prepared(columns, applied, rows=count_rows(columns)))\n"
        "        return applied\n",
        f"{REPORT} -k refused_do_not_count",
    ),
    Mutation(
        "a class is larger than it is, because 1 and True are equal",
        "anonymize/classes.py",
        "for kind in (str, bytes, bool, int):",
        "for kind in (str, bytes, int):",
        "tests/anonymize/test_classes.py -k takes_for_equal",
    ),
    Mutation(
        "what ends a text ends no match, and is lost",
        "redaction/detect/prefilter.py",
        '_BETWEEN: Final = f"\\n{_MARK}\\n"',
        "_BETWEEN: Final = _MARK",
        "tests/redaction/test_screening.py -k end_to_end",
    ),
    Mutation(
        "a match that ends where its text does hides the next text",
        "redaction/detect/prefilter.py",
        "data.find(mark, match.end())",
        "data.find(mark, match.end() + 1)",
        "tests/redaction/test_screening.py -k end_to_end",
    ),
    Mutation(
        "a text with half of a surrogate pair is not looked at, and is sealed",
        "redaction/detect/prefilter.py",
        "range(0x80, 0xD800), range(0xE000, 0x10000)",
        "range(0x80, 0x10000)",
        "tests/anonymize/test_findings.py -k cannot_be_checked",
    ),
    Mutation(
        "what lies behind the pixels of a PNG is sealed",
        "data/sources/metadata.py",
        "    return pixels[: len(pixels) - len(inflate.unused_data)]\n",
        "    return pixels\n",
        "tests/data/sources/test_images.py -k hidden_beside",
    ),
    Mutation(
        "texts in another spelling are passed over where many are looked through",
        "redaction/detect/prefilter.py",
        "        (DISGUISED, _compiled(SPELLINGS)),\n",
        "",
        "tests/anonymize/test_findings.py -k as_by_a_redactor",
    ),
    Mutation(
        "numbers that shards do not tell apart count as different values",
        "data/writing/row_buffer.py",
        "Applied(dict(part), applied.found)",
        "applied",
        f"{REPORT} -k one_number",
    ),
    Mutation(
        "text that is kept as bytes is said to hold nothing",
        "anonymize/findings.py",
        "        return None if _CONTROL.search(value) else _decoded(value)\n",
        '        return ""\n',
        "tests/anonymize/test_findings.py -k bytes_that_are_text",
    ),
    Mutation(
        "a text that says it is another one is passed over",
        "anonymize/findings.py",
        "_exact: Final = str.__str__\n",
        "_exact = lambda text: text\n",
        "tests/anonymize/test_findings.py -k says_it_is_another",
    ),
    Mutation(
        "what a WebP says of its place is not seen",
        "anonymize/pictures.py",
        'return b"EXIF" in data or b"XMP " in data or',
        "return",
        "tests/anonymize/test_pictures.py -k 'besides and WEBP'",
    ),
]
