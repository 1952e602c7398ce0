#!/bin/sh
# The page of a Space: the Hub says by SPACE_HOST where browsers find it, and shows it in a frame of its own.
set -eu
folder=/data
[ -w "$folder" ] || folder=$HOME
site=${SPACE_HOST:+https://$SPACE_HOST}
exec mergemill ui "$folder" --host 0.0.0.0 --port 7860 --url "${site:-http://127.0.0.1:7860}" \
    --framed-by https://huggingface.co
