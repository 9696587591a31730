#!/usr/bin/bash
# Has nginx serve the certificate that certbot keeps, if it serves another one. Runs on the gateway,
# as root: twice a day behind certbot (gateway-certificate.service), and in a deploy.
#
#   take-certificate LINEAGE CERTIFICATE KEY PORT NAME
#     LINEAGE           certbot's folder, with fullchain.pem and privkey.pem
#     CERTIFICATE, KEY  the files that nginx.conf names
#     PORT, NAME        where nginx serves by TLS, and the host name that is asked for
#
# The pair is checked, swapped in by renames, checked by nginx -t, and nginx reloaded, which leaves
# open sockets alone; then the port has to show it. Else the pair before is back. A run that was cut
# is repaired by the next: compared is what lies in LINEAGE with what the port shows.
set -u
trap '' PIPE HUP
lineage=$1 certificate=$2 key=$3 port=$4 name=$5

say() { printf '%s\n' "$*" >&2; }
beside() { printf '%s/.%s.%s' "${1%/*}" "${1##*/}" "$2"; }
fingerprint() { openssl x509 -noout -fingerprint -sha256 2>/dev/null; }
public_key() { openssl x509 -in "$1" -noout -pubkey 2>/dev/null; }

served() {
    openssl s_client -connect "127.0.0.1:$port" -servername "$name" </dev/null 2>/dev/null |
        fingerprint
}

in_place() {
    cmp -s "$lineage/fullchain.pem" "$certificate" && cmp -s "$lineage/privkey.pem" "$key"
}

is_served() {
    for _ in $(seq 100); do
        [[ $(served) != "$wanted" ]] || return 0
        sleep 0.1
    done
    return 1
}

check() {
    local of; of=$(public_key "$lineage/fullchain.pem")
    if [[ -z $of || $of != "$(openssl pkey -in "$lineage/privkey.pem" -pubout 2>/dev/null)" ]]; then
        say "the key in $lineage is not that of its certificate"
        return 1
    fi
    if ! openssl x509 -in "$lineage/fullchain.pem" -noout -checkend 0 >/dev/null; then
        say "the certificate in $lineage has ended"
        return 1
    fi
}

# stage SUFFIX CERTIFICATE KEY: copies beside the live files.
stage() {
    install -m 600 -- "$3" "$(beside "$key" "$1")" &&
        install -m 644 -- "$2" "$(beside "$certificate" "$1")"
}

swap_in() {
    mv -fT -- "$(beside "$key" "$1")" "$key" && mv -fT -- "$(beside "$certificate" "$1")" "$certificate"
}

put_back() {
    say "$1"
    if ! swap_in outgoing; then
        say "the certificate before could not be put back: move $(beside "$key" outgoing) to $key and" \
            "$(beside "$certificate" outgoing) to $certificate by hand, then: systemctl reload nginx"
    elif [[ $running != active ]]; then
        say "the certificate before is back; nginx does not run"
    elif systemctl reload nginx.service && wanted=$(fingerprint <"$certificate") && is_served; then
        say "the certificate before is back, and nginx serves on"
    else
        say "the certificate before is back in its place, but port $port does not show it; see:" \
            "tail /var/log/nginx/error.log"
    fi
    exit 1
}

if [[ ! -e $lineage/fullchain.pem ]]; then
    say "certbot has no certificate in $lineage yet"
    exit 1
fi
# A deploy that changes nginx at this moment is waited for.
mkdir -p /run/gpu-gateway
exec 8>/run/gpu-gateway/lock
flock --wait 120 8 || { say "a deploy has been changing this gateway for two minutes; try again"; exit 1; }

wanted=$(fingerprint <"$lineage/fullchain.pem")
running=$(systemctl is-active nginx.service)
if in_place && [[ $running != active || $(served) == "$wanted" ]]; then
    exit 0
fi
check || { say "it is not taken; nginx serves on with the certificate before"; exit 1; }
if ! { stage outgoing "$certificate" "$key" && stage candidate "$lineage/fullchain.pem" "$lineage/privkey.pem"; }
then
    say "could not stage the new certificate beside $certificate (is the disk full?); nothing was changed"
    exit 1
fi
swap_in candidate || put_back "could not swap the new certificate in"
if [[ $running == active ]]; then
    nginx -t -q || put_back "nginx -t does not accept the new certificate"
    systemctl reload nginx.service || put_back "nginx did not reload"
    is_served || put_back "port $port does not show the new certificate after a reload"
fi
rm -f -- "$(beside "$key" outgoing)" "$(beside "$certificate" outgoing)"
say "$certificate is new: $(openssl x509 -in "$certificate" -noout -enddate | sed 's/notAfter=/it ends on /')"
