def write(r, f):
    (f / "report.html").write_text("x")


def summary(r):
    return "\n".join(f"{n} {v['runs']}" for n, v in r["variants"].items())
