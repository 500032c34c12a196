# SPDX-License-Identifier: GPL-2.0-or-later
#
# A thin front for the scripts in tools/, lab/ and bench/; each of them says
# at its top what it does.

BUILD ?= build
QEMU_SRC ?=
LIBVIRT_SRC ?=
JOBS ?= $(shell nproc)

override BUILD := $(abspath $(BUILD))
ifneq ($(QEMU_SRC),)
override QEMU_SRC := $(abspath $(QEMU_SRC))
endif
ifneq ($(LIBVIRT_SRC),)
override LIBVIRT_SRC := $(abspath $(LIBVIRT_SRC))
endif
QEMU := $(BUILD)/qemu-system-x86_64
STOCK := $(BUILD)/stock/qemu-system-x86_64
# Only `make libvirt` makes that tree; once it is there, others care for it.
NO_LIBVIRT := [ ! -d '$(BUILD)/libvirt/src' ]
export BUILD QEMU_SRC LIBVIRT_SRC JOBS QEMU STOCK

.PHONY: all stock libvirt setup prepare series refresh lint bisect check \
	check-full check-kvm check-libvirt bench-kvm kernel demo demo-libvirt bench \
	clean help
.NOTPARALLEL:

all: prepare		## build QEMU with the series: $(BUILD)/qemu-system-x86_64
	@tools/build series

stock: prepare		## build the same QEMU unmodified, below $(BUILD)/stock
	@tools/build stock

libvirt:		## build libvirt with its series, in $(BUILD)/libvirt/obj
	@tools/setup libvirt
	@tools/prepare libvirt
	@tools/build-libvirt series

setup:			## install what building needs (Debian, as root)
	@tools/setup

prepare: setup		## QEMU's source with the series applied: $(BUILD)/src
	@tools/prepare

series: prepare		## export the series as mails: $(BUILD)/series/<topic>
	@tools/series
	@$(NO_LIBVIRT) || { tools/prepare libvirt && tools/series libvirt; }

refresh:		## bring the commits in $(BUILD)/src back into the series
	@tools/refresh
	@$(NO_LIBVIRT) || tools/prepare libvirt --saved 2>/dev/null || \
		tools/refresh libvirt

lint: prepare		## check the series and the scripts
	@tools/lint
	@$(NO_LIBVIRT) || { tools/prepare libvirt && tools/lint libvirt; }

bisect: prepare		## build and test every commit of the series
	@tools/bisect

check: setup		## the tests; the last line sums them up
	@tools/check

check-full: setup	## more with KVM, and half an hour of snapshots: 55 minutes more
	@tools/check --full

check-kvm: setup	## tests with the patched KVM and Debian's, in TCG guests
	@tools/check prepare build build-stock lab-setup kvm

check-libvirt: setup	## build libvirt with its series and without, and test it
	@tools/check prepare build build-stock lab-setup libvirt-setup \
		libvirt-prepare libvirt-lint libvirt-build libvirt-stock \
		libvirt-tests libvirt

bench-kvm: setup	## what a stopped write costs with it, for each write trap
	@tools/check prepare build build-stock lab-setup
	@bench/kvm

kernel:			## that KVM: modules for Debian's kernel, and for DKMS
	@lab/setup
	@lab/nested/build

demo: all		## snapshot a guest with a database, restore it in Debian's QEMU
	@lab/setup guest
	@STOCK="$$(tools/unmodified)" && lab/demo

demo-libvirt: all libvirt	## the same by libvirt, driven by virsh alone
	@lab/setup guest
	@STOCK="$$(tools/unmodified)" && lab/demo-libvirt

bench: all stock	## measure side by side with unmodified QEMU
	@lab/setup bench
	@bench/run

clean:			## remove $(BUILD), unless it holds unsaved commits
	@tools/prepare --saved
	@tools/prepare libvirt --saved
	rm -rf '$(BUILD)'

help:			## this text
	@echo 'Variables: BUILD=build directory, JOBS=compilers at a time,'
	@echo '  QEMU_SRC=QEMU source (directory, tarball or git checkout;'
	@echo "  default: Debian's source package),"
	@echo "  LIBVIRT_SRC=libvirt source (the same; default: upstream's tarball)"
	@awk -F ':[^#]*## *' '/^[a-z-]+:.*## / \
		{ printf "%-13s %s\n", $$1, $$2 }' Makefile
