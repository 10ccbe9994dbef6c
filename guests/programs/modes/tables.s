# Descriptors and variables of the tour.

    .balign 16
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF            # 08: 64-bit code
    .quad 0x00CF93000000FFFF            # 10: data, 4 GiB
    .quad 0x00CF9B000000FFFF            # 18: 32-bit code, 4 GiB
    .quad 0x00009B000000FFFF            # 20: 16-bit code, 64 KiB
    .quad 0x000093000000FFFF            # 28: 16-bit data, 64 KiB
    .word tss_a_end - tss_a - 1, tss_a - tour_begin + 0x8000, 0x8900, 0   # 30
    .word 103, tss_b - tour_begin + 0x8000, 0x8900, 0                     # 38
gdt_end:

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt - tour_begin + 0x8000
idt32_pointer:
    .word idt32_end - idt32 - 1
    .long idt32 - tour_begin + 0x8000
ivt_pointer:
    .word 0x3FF
    .long VECTORS

.macro gate32 handler
    .word \handler - tour_begin + 0x8000, 0x18, 0x8E00, 0
.endm
.macro no_gates count
    .fill \count, 8, 0
.endm

    .balign 8
idt32:
    gate32 divide_error32
    no_gates 12
    gate32 general_protection32         # 13
    gate32 page_fault32                 # 14
    no_gates 0x42 - 15
    gate32 interrupt32                  # 42
    .word interrupt16 - tour_begin + 0x8000, 0x20, 0x8600, 0              # 43: 16-bit gate
    .word 0, TASK_B, 0x8500, 0                                            # 44: task gate
    .word virtual_interrupt - tour_begin + 0x8000, 0x18, 0xEE00, 0        # 45: ring 3 may
idt32_end:

# SDM vol. 3A figure 9-2.
    .balign 16
tss_a:
    .long 0, STACK - 0x200, 0x10        # link, ESP0, SS0
    .fill 22, 4, 0
    .word 0, 104                        # where the I/O permission bits begin
    # Virtual-8086 code needs a zero bit for each port: the serial port's, 3F8 to 3FF.
    .fill 0x3F8 / 8, 1, 0xFF
    .byte 0, 0xFF
tss_a_end:
    .balign 16
tss_b:
    .long 0, 0, 0, 0, 0, 0, 0, 0        # link, three stacks, CR3
    .long task_b - tour_begin + 0x8000, 2                   # EIP, EFLAGS
    .long 0xB, 0, 0, 0, TASK_B_STACK, 0, 0, 0               # EAX to EDI
    .long 0x10, 0x18, 0x10, 0x10, 0x10, 0x10                # ES, CS, SS, DS, FS, GS
    .long 0                                                 # LDT
    .word 0, 104

    .balign 8
saved_rsp: .quad 0
saved_cr3: .quad 0
saved_cr4: .quad 0
saved_gdt: .fill 10
    .balign 8
saved_idt: .fill 10
    .balign 8
resume32: .long 0
resume16: .long 0
scratch: .long 0
monitor_esp: .long 0
refused: .long 0
    .global tour_end
tour_end:
    .code64
    .text
