# shellcheck shell=sh disable=SC2034
# SPDX-License-Identifier: GPL-2.0-or-later
#
# What tools/build and tools/build-libvirt have in common: they source this
# with $BUILD, and $trees for where the project's trees are.  It takes the
# first argument, $which of them to build, and gives that one's $top, $src
# and $obj.
which=${1:-}
[ $# = 0 ] || shift

case $which in
series) top=${trees:?} ;;
stock | bisect) top=$trees/$which ;;
*)
    echo "usage: $(basename "$0") series|stock|bisect [TARGET...]" >&2
    exit 2
    ;;
esac
src=$top/src obj=$top/obj

# The base without the series, as a plain directory.
if [ "$which" = stock ]; then
    base=$(git -C "$trees/src" rev-parse base)
    if [ "$(cat "$top/base" 2>/dev/null)" != "$base" ]; then
        rm -rf "$src" "$top/base"
        mkdir -p "$src"
        GIT_INDEX_FILE=$top/index git -C "$trees/src" read-tree base
        GIT_INDEX_FILE=$top/index git -C "$trees/src" checkout-index -a \
            --prefix="$src/"
        rm "$top/index"
        echo "$base" >"$top/base"
    fi
fi

export CCACHE_BASEDIR="$BUILD" CCACHE_NOHASHDIR=1
