# What a deploy found on this host before its first change, and what it put there since, so that it
# can be taken away again. Runs on the host, as root. provision/record.py says what is noted when.
#
# The journal is text, a note a line, its words apart by tabs: KIND KEY ASPECT VALUE. What was found
# is noted once and never changed; a note that is there is not made again.
set -u
umask 077
state=/var/lib/gpu-gateway
record=$state/record
journal=$record/journal

begin() {
    [ ! -d "$record" ] || return 0
    [ -d "$state" ] || install -d -m 755 "$state" || return 1
    late=
    if [ -e "$state/applied" ] || [ -e /opt/gpu-service ]; then late=yes; fi
    mkdir "$record" || return 1
    note run first found "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
    [ -z "$late" ] || note run late found yes
}

# KIND KEY: whether it was noted what was found there.
known() { grep -qsF -- "$1	$2	found	" "$journal"; }

# KIND KEY ASPECT VALUE
note() {
    line="$1	$2	$3	$4"
    grep -qsxF -- "$line" "$journal" || printf '%s\n' "$line" >>"$journal"
}

# As it came, also where the same was noted before: a port may be opened, closed, opened again.
append() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$journal"; }

file_state() {
    if [ -L "$1" ]; then printf 'link %s' "$(readlink "$1")"
    elif [ -f "$1" ]; then
        printf '%s %s' "$(stat -c '%a %U %G' "$1")" "$(sha256sum <"$1" | cut -d ' ' -f 1)"
    elif [ -e "$1" ]; then printf 'other'
    else printf 'absent'; fi
}

# Folders that are missing on the way to a path, and will be made.
note_folders() {
    folder=$1
    while [ ! -e "$folder" ] && [ "$folder" != / ]; do
        known folder "$folder" || note folder "$folder" found absent
        folder=${folder%/*}
        folder=${folder:-/}
    done
}

# The copy first: a note never names one that is not there.
note_file() {
    known file "$1" && return
    found=$(file_state "$1")
    if [ "$found" = absent ]; then
        note_folders "${1%/*}"
    else
        copy=$record/found$1
        mkdir -p "${copy%/*}" && cp -a "$1" "$copy.partial" && mv -fT "$copy.partial" "$copy" ||
            { echo "no copy of $1 could be kept in $record; nothing was changed" >&2; exit 1; }
    fi
    note file "$1" found "$found"
}

# Name and version of what is installed. Keys that packages are believed by are entries of the same
# name: theirs holds the version.
packages() {
    if command -v dnf >/dev/null || command -v yum >/dev/null; then
        rpm -qa --queryformat '%{NAME}\t%{VERSION}-%{RELEASE}\n' |
            sed 's/^gpg-pubkey\t\(.*\)/gpg-pubkey-\1\t\1/'
    else
        dpkg-query --show --showformat '${db:Status-Abbrev}\t${Package}\t${Version}\n' |
            sed -n 's/^ii *\t//p'
    fi | LC_ALL=C sort -u
}

version_of() { awk -F '\t' -v name="$1" '$1 == name { print $2; exit }' "$record/packages"; }

names() {
    case $1 in
        package) cut -f 1 "$record/packages" | LC_ALL=C sort -u ;;
        user) cut -d : -f 1 /etc/passwd | LC_ALL=C sort ;;
        group) cut -d : -f 1 /etc/group | LC_ALL=C sort ;;
    esac
}

# PACKAGE…: noted before they are installed. The first gives what comes its name; it is written last,
# when the rest is whole.
note_packages() {
    packages >"$record/packages" || exit 1
    for package; do
        known package "$package" && continue
        found=$(version_of "$package")
        note package "$package" found "${found:-absent}"
    done
    for kind in package user group; do names $kind >"$record/before.$kind"; done
    rm -f "$record/packages"
    printf '%s\n' "$1" >"$record/before.asked"
}

# PACKAGE: what came since then came with it: what it needs, and users.
note_came() {
    [ -e "$record/before.asked" ] || return 0
    packages >"$record/packages" || exit 1
    for kind in package user group; do
        names $kind | LC_ALL=C comm -13 "$record/before.$kind" - >"$record/came"
        while IFS= read -r name; do note package "$1" "came-$kind" "$name"; done <"$record/came"
    done
    note package "$1" wrote "$(version_of "$1")"
    rm -f "$record/came" "$record/packages" "$record"/before.*
}

# An installation that was cut, or failed: what came with it is noted now. Where the package is not
# there, or a day has gone by, what is new may as well be somebody else's: to make it work, say.
end_installation() {
    [ -e "$record/before.asked" ] || return 0
    asked=$(cat "$record/before.asked")
    packages >"$record/packages" || exit 1
    if [ -n "$(version_of "$asked")" ] && [ -n "$(find "$record/before.asked" -mtime -1)" ]; then
        note_came "$asked"
    else
        # But for keys, which nginx_packages.keys_go tells apart by whose they are.
        names package | LC_ALL=C comm -13 "$record/before.package" - | grep '^gpg-pubkey-' |
            while IFS= read -r name; do note package "$asked" came-key "$name"; done
        rm -f "$record/packages" "$record"/before.*
    fi
}

# KIND (user, group) NAME
note_account() {
    known "$1" "$2" && return
    if names "$1" | grep -qxF -- "$2"; then note "$1" "$2" found present
    else note "$1" "$2" found absent; fi
}

# UNIT, before it is enabled or started.
note_unit() {
    known unit "$1" && return
    enabled=$(systemctl is-enabled "$1" 2>/dev/null)
    active=$(systemctl is-active "$1" 2>/dev/null)
    note unit "$1" found "${enabled:-absent} ${active:-inactive}"
}

begin || { echo "$record cannot be made; nothing was changed" >&2; exit 1; }
verb=$1
shift
[ "$verb" = came ] || end_installation
case $verb in
    ended) ;;
    file)
        note_file "$1"
        [ -z "${2-}" ] || note file "$1" wrote "$2"
        ;;
    folders) for folder; do note_folders "$folder"; done ;;
    packages) note_packages "$@" ;;
    came) note_came "$1" ;;
    account) note_account "$@" ;;
    unit) note_unit "$1" ;;
    found) known "$1" "$2" || note "$1" "$2" found "$3" ;;
    wrote) note "$1" "$2" wrote "$3" ;;
    append) append "$@" ;;
esac
