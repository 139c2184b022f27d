#!/bin/sh
# Debian's Chromium, for the tests that open the report in a browser: installed where it is missing and we may; else those tests are skipped.
command -v chromium >/dev/null 2>&1 && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 0
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { timeout 120 apt-get update -q && timeout 600 apt-get install -q -y --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1; then
  echo "chromium could not be installed: $(tail -n 1 "$log")" >&2
fi
rm -f "$log"
