"""The answer: tables, claims with verdicts, the page."""
