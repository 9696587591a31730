# apt-get with packages that must not touch the nginx that runs: Debian's start it where they are
# new and restart it where they are not, which closes every socket. What runs changes when its
# configuration was checked, and without a restart (nginx-activate.sh).
#
#   apt-install POLICY ARGUMENT…     POLICY: where Debian's scripts ask what they may do
#
# https://people.debian.org/~hmh/invokerc.d-policyrc.d-specification.txt
set -u
policy=$1
shift
mark="# Written by the gateway's deploy, for as long as it installs nginx."

is_ours() { [ -e "$policy" ] && grep -qxF "$mark" "$policy"; }

# Somebody else's is asked as ever; one that a run left which was cut is replaced.
if [ ! -e "$policy" ] || is_ours; then
    trap 'rm -f "$policy"' EXIT
    printf '%s\n' '#!/bin/sh' "$mark" \
        'for word; do case $word in nginx | nginx.service) exit 101 ;; esac; done; exit 0' \
        >"$policy.candidate" && chmod 755 "$policy.candidate" && mv -f "$policy.candidate" "$policy" ||
        { echo "$policy cannot be written; nothing was installed" >&2; exit 1; }
fi
DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends --allow-downgrades \
    -o Dpkg::Options::=--force-confold install "$@"
