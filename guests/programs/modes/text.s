# Printing from 16-bit and 32-bit code. Everything here is linked elsewhere but runs at 0x8000:
# an address is spelled (label - tour_begin + 0x8000).

    .section .text.tour, "ax"
    .balign 16
    .global tour_begin
tour_begin:

# say16 TEXT, say32 TEXT: prints a text given in the line.
.macro say16 text
    push %si
    mov $(9f - tour_begin + 0x8000), %si
    call puts16
    pop %si
    jmp 8f
9:  .asciz "\text"
8:
.endm

.macro say32 text
    push %esi
    mov $(9f - tour_begin + 0x8000), %esi
    call puts32
    pop %esi
    jmp 8f
9:  .asciz "\text"
8:
.endm

# show16 TEXT, show32 TEXT: prints the text and AX, EAX in hex, and ends the line.
.macro show16 text
    say16 "\text"
    call puthex16
    say16 "\r\n"
.endm

.macro show32 text
    say32 "\text"
    call puthex32
    say32 "\r\n"
.endm

    .code16
# Prints the text at CS:SI.
puts16:
    push %ax
1:  mov %cs:(%si), %al
    inc %si
    test %al, %al
    jz 2f
    call putc16
    jmp 1b
2:  pop %ax
    ret

putc16:
    push %dx
    push %ax
    mov $0x3FD, %dx
3:  in %dx, %al
    test $0x20, %al
    jz 3b
    pop %ax
    mov $0x3F8, %dx
    out %al, %dx
    pop %dx
    ret

# Prints AX as four hex digits.
puthex16:
    push %ax
    push %cx
    push %dx
    mov %ax, %dx
    mov $4, %cx
4:  rol $4, %dx
    mov %dl, %al
    and $0x0F, %al
    add $'0', %al
    cmp $'9', %al
    jbe 5f
    add $('a' - '9' - 1), %al
5:  call putc16
    loop 4b
    pop %dx
    pop %cx
    pop %ax
    ret

    .code32
# Prints the text at CS:ESI.
puts32:
    push %eax
1:  mov %cs:(%esi), %al
    inc %esi
    test %al, %al
    jz 2f
    call putc32
    jmp 1b
2:  pop %eax
    ret

putc32:
    push %edx
    push %eax
    mov $0x3FD, %edx
3:  in %dx, %al
    test $0x20, %al
    jz 3b
    pop %eax
    mov $0x3F8, %edx
    out %al, %dx
    pop %edx
    ret

# Prints EAX as eight hex digits.
puthex32:
    push %eax
    push %ecx
    push %edx
    mov %eax, %edx
    mov $8, %ecx
4:  rol $4, %edx
    mov %dl, %al
    and $0x0F, %al
    add $'0', %al
    cmp $'9', %al
    jbe 5f
    add $('a' - '9' - 1), %al
5:  call putc32
    loop 4b
    pop %edx
    pop %ecx
    pop %eax
    ret
