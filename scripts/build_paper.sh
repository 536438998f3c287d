#!/usr/bin/env bash
# Build the paper as PDF with latexmk or pdflatex.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tex="$root/docs/paper/ttr.tex"
outdir="$root/build/paper"
engine=auto
clean=0
dry_run=0

usage() {
  cat <<'TEXT'
Usage: scripts/build_paper.sh [options]

Options:
  --tex PATH       LaTeX source (default: docs/paper/ttr.tex)
  --outdir PATH    where the PDF goes (default: build/paper)
  --engine NAME    auto, latexmk or pdflatex; auto takes latexmk where it is installed (default: auto)
  --clean          remove LaTeX's auxiliary files after the build, keep the PDF
  --dry-run        print the commands, run nothing
  -h, --help       show this text
TEXT
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

value() {
  if [ "$#" -lt 2 ] || [ -z "$2" ] || [ "${2#--}" != "$2" ]; then
    fail "option $1 needs a value"
  fi
}

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [ "$dry_run" -eq 0 ]; then
    "$@"
  fi
}

while [ "$#" -gt 0 ]; do
  case "$1" in
    --tex) value "$@"; tex=$2; shift 2 ;;
    --outdir) value "$@"; outdir=$2; shift 2 ;;
    --engine) value "$@"; engine=$2; shift 2 ;;
    --clean) clean=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option: $1 (--help lists them)" ;;
  esac
done

case "$engine" in
  auto)
    engine=pdflatex
    if command -v latexmk >/dev/null; then
      engine=latexmk
    fi
    ;;
  latexmk | pdflatex) ;;
  *) fail "unknown engine: $engine (auto, latexmk or pdflatex)" ;;
esac
[ -f "$tex" ] || fail "no such file: $tex"
if [ "$dry_run" -eq 0 ]; then
  command -v "$engine" >/dev/null || fail "$engine is not installed (Debian: apt-get install latexmk texlive-latex-extra)"
fi

name=$(basename "$tex" .tex)
case "$outdir" in
  /*) ;;
  *) outdir="$PWD/$outdir" ;;
esac
pdf="$outdir/$name.pdf"
flags=(-interaction=nonstopmode -halt-on-error -file-line-error "-output-directory=$outdir")

run mkdir -p "$outdir"
# Figures are named relative to the source.
run cd "$(dirname "$tex")"
if [ "$engine" = latexmk ]; then
  run latexmk -pdf "${flags[@]}" "$name.tex"
else
  # The second pass resolves references and citations.
  run pdflatex "${flags[@]}" "$name.tex"
  run pdflatex "${flags[@]}" "$name.tex"
fi

if [ "$clean" -eq 1 ]; then
  if [ "$engine" = latexmk ]; then
    run latexmk -c "-output-directory=$outdir" "$name.tex"
  else
    for ending in aux fdb_latexmk fls log out toc; do
      run rm -f "$outdir/$name.$ending"
    done
  fi
fi

if [ "$dry_run" -eq 0 ]; then
  [ -f "$pdf" ] || fail "$engine ended without an error and left no $pdf"
  echo "Built $pdf"
fi
