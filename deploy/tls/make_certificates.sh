#!/usr/bin/env bash
# Make a certificate authority, and a certificate for each of scheduler, workers and client of a Dask cluster.
#
#   deploy/tls/make_certificates.sh FOLDER [DAYS]
#
# FOLDER is made, and must not be there before: nothing is overwritten. Keys are readable for their owner alone. Each
# machine gets ca.pem and its own pair; ca-key.pem stays where you keep secrets, and is needed for further
# certificates only. dask.yaml names the files as they lie in FOLDER: DASK_CONFIG=FOLDER, which Dask reads with every
# other YAML file that you put there, or DASK_CONFIG=FOLDER/dask.yaml alone.
set -euo pipefail
umask 077

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 FOLDER [DAYS]" >&2
    exit 2
fi
folder=$1
days=${2:-365}
if ! [[ $days =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: DAYS is '$days'; it must be a number of days, such as 365" >&2
    exit 2
fi
if [ -e "$folder" ] || [ -L "$folder" ]; then
    echo "$0: $folder is there already; nothing was changed. Choose another folder, or move it away" >&2
    exit 1
fi

mkdir -p "$(dirname "$folder")"
parent=$(cd "$(dirname "$folder")" && pwd)
folder=$parent/$(basename "$folder")
made=$(mktemp -d "$parent/.certificates-XXXXXX") # renamed when all is there
trap 'rm -rf "$made"' EXIT
curve=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)

openssl req -x509 "${curve[@]}" -days "$days" -subj "/CN=mergemill CA" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$made/ca-key.pem" -out "$made/ca.pem" 2>"$made/log" || { cat "$made/log" >&2 && exit 1; }

for role in scheduler worker client; do
    printf '%s\n' "basicConstraints=critical,CA:FALSE" "extendedKeyUsage=serverAuth,clientAuth" >"$made/extensions"
    openssl req "${curve[@]}" -subj "/CN=mergemill $role" -keyout "$made/$role-key.pem" -out "$made/request" \
        2>"$made/log" || { cat "$made/log" >&2 && exit 1; }
    openssl x509 -req -in "$made/request" -CA "$made/ca.pem" -CAkey "$made/ca-key.pem" -days "$days" \
        -set_serial "0x$(openssl rand -hex 16)" -extfile "$made/extensions" -out "$made/$role.pem" \
        2>"$made/log" || { cat "$made/log" >&2 && exit 1; }
done
rm -f "$made/request" "$made/extensions" "$made/log"

{
    echo "distributed:"
    echo "  comm:"
    echo "    default-scheme: tls"
    echo "    require-encryption: true"
    echo "    tls:"
    echo "      ca-file: \"$folder/ca.pem\""
    for role in scheduler worker client; do
        echo "      $role: {cert: \"$folder/$role.pem\", key: \"$folder/$role-key.pem\"}"
    done
} >"$made/dask.yaml"

chmod 600 "$made"/*-key.pem
chmod 644 "$made"/{ca,scheduler,worker,client}.pem "$made/dask.yaml"
mv -T "$made" "$folder"
trap - EXIT
echo "$folder: ca, scheduler, worker and client, good for $days days"
