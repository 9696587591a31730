# Waits until this gateway sends clients to each of the workers again, and at most SECONDS: then nginx
# tries them by itself. Runs on the gateway.
#
#   worker-seen PLACE SECONDS WORKER…     PLACE: where their service is, as handshake.sh reads it;
#                                         WORKER: as it calls itself
#
# Each look is a request that nginx gives to a worker as it gives a client's; least_conn gives it to
# the one that has just come back. Where requests do not get through (a token, a client's certificate),
# it waits.
place=$1 until=$((SECONDS + $2)) scheme=http name=localhost path=
shift 2
[[ $place != tls:* ]] || { scheme=https place=${place#tls:}; }
[[ $place != */* ]] || { path=/${place#*/} place=${place%%/*}; }
[[ $place != *@* ]] || { name=${place#*@} place=${place%%@*}; }

look() {
    curl --silent --insecure --http1.1 --max-time 2 --resolve "$name:$place:127.0.0.1" \
        "$scheme://$name:$place$path/v2"
}

missing=" $* "
while [[ -n ${missing// /} && $SECONDS -lt $until ]]; do
    answer=$(look)
    for worker in $missing; do
        [[ $answer != *"\"worker\":\"$worker\""* ]] || missing=${missing/" $worker "/ }
    done
    sleep 0.1
done
