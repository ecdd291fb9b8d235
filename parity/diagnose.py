from dataclasses import dataclass
@dataclass
class Finding:
    cause: str
    sentence: str
def diagnose(c, d): return Finding("unknown", "I do not know")
def report(c, d, f): return f"first: {d} error {d.error:.2e} ranks {d.ranks} of {d.n_pieces}\n{f.sentence}"
